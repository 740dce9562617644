"""Units behind the number of an answer, mapped to one symbol each without conversion."""

from __future__ import annotations

import re

_NAMES = {
    "nm": "nanometre nanometer",
    "µm": "um μm micrometre micrometer micron",
    "mm": "millimetre millimeter",
    "cm": "centimetre centimeter",
    "dm": "decimetre decimeter",
    "m": "metre meter",
    "km": "kilometre kilometer",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram gramme",
    "kg": "kilogram kilo kgs",
    "lb": "lbs pound",
    "oz": "ounce",
    "ms": "millisecond",
    "s": "sec secs second",
    "min": "mins minute",
    "h": "hr hrs hour",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr yrs",
    "ml": "mL millilitre milliliter",
    "l": "L litre liter",
    "°": "degree deg degs 度",
    "°C": "℃ celsius",
    "°F": "℉ fahrenheit",
    "rad": "radian",
    "K": "kelvin",
    "%": "percent percentage pct",
    "$": "dollar usd USD",
    "€": "euro EUR",
    "£": "GBP",
    "¥": "yen yuan",
    "cent": "¢",
    "N": "newton",
    "J": "joule",
    "kJ": "kilojoule",
    "W": "watt",
    "kW": "kilowatt",
    "V": "volt",
    "A": "ampere amp",
    "Ω": "ohm",
    "Hz": "hertz",
    "kHz": "kilohertz",
    "Pa": "pascal",
    "kPa": "kilopascal",
    "mol": "mole",
    "unit": "",
    "kWh": "kwh KWH Kwh",
    **{"kbps": "Kbps", "Mbps": "mbps", "Gbps": "gbps", "kBps": "KBps", "MBps": "", "GBps": ""},
}
_PREFIXES = {
    **{"T": "tera", "G": "giga", "M": "mega", "k": "kilo", "h": "hecto", "d": "deci", "c": "centi"},
    **{"m": "milli", "µ": "micro", "n": "nano", "p": "pico"},
}
_PREFIXED = {
    **{"m": "metre meter", "g": "gram", "s": "second", "l": "litre liter", "A": "ampere amp"},
    **{"K": "kelvin", "mol": "mole", "Hz": "hertz", "N": "newton", "Pa": "pascal", "J": "joule"},
    **{"W": "watt", "V": "volt", "Ω": "ohm", "F": "farad", "H": "henry", "C": "coulomb"},
    **{"T": "tesla", "eV": "electronvolt", "cal": "calorie", "bar": "", "B": "byte", "b": "bit"},
    **{"Wh": "", "Ah": "", "Bq": "becquerel", "Sv": "sievert", "Gy": "gray", "pc": "parsec"},
}
"""Units that take a prefix, whose case has a meaning: MW and mW."""
_NO_UNITS = {"pm", "pH"}
_ABBREVIATED = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}


def _with_prefixes() -> dict[str, str]:
    symbols: dict[str, str] = {}
    for short, prefix in _PREFIXES.items():
        for unit, names in _PREFIXED.items():
            spellings = [short + unit, *(prefix + name for name in names.split())]
            spellings += [short + "L"] if unit == "l" else []
            spellings += ["K" + unit] if short == "k" else []
            spellings += ["μ" + unit, "u" + unit] if short == "µ" else []
            symbols |= dict.fromkeys(spellings, short + unit)
    return {name: symbol for name, symbol in symbols.items() if name not in _NO_UNITS}


UNIT_SYMBOLS = (
    _with_prefixes()
    | {symbol: symbol for symbol in _NAMES}
    | {name: symbol for symbol, names in _NAMES.items() for name in names.split()}
)
"""The symbol for each symbol or name as written. Names are also known in capitals and plural."""
_POWERS = {"square": "^2", "sq": "^2", "squared": "^2", "cubic": "^3", "cubed": "^3"}
_DEGREES = ("°c", "°celsius", "°f", "°fahrenheit")
_FACTOR = re.compile(r"([^\d\s^/*·]+)(\^-?\d)?")
_SHORTEST_WORD = 3


def unit_of(text: str) -> str | None:
    """Return the unit in ``text``, the text after a number; None if it is not a unit.

    A unit is a product or quotient of known units ("m/s^2", "km per hour", "square metres"), where
    a single letter needs a space before it, or up to three words of at least three letters, which
    are returned in lower case and singular.
    """
    words = re.sub(r"\bper\b", "/", text.strip().rstrip(".")).replace("° ", "°")
    words = re.sub(r"\bdegrees?\s+(c|celsius|f|fahrenheit)\b", r"°\1", words, flags=re.IGNORECASE)
    words = re.sub(r"(?<=[A-Za-z])\.(?=\s|$)", "", words)  # "sq. ft."
    words = re.sub(r"\s*([/*·^])\s*", r"\1", words.replace("×", "*"))
    words = re.sub(r"(?<![A-Za-z])([µμ]|[kM](?=\s*Ω))\s+(?=[A-Za-zΩ])", r"\1", words)
    parts: list[str] = []
    prefix = ""
    for word in words.split():
        if word.lower() in ("square", "sq", "cubic"):
            prefix = _POWERS[word.lower()]
        elif word.lower() in ("squared", "cubed") and parts:
            parts[-1] += _POWERS[word.lower()]
        else:
            parts.append(word + prefix)
            prefix = ""
    if not parts or prefix:
        return None
    if len(parts) == 1:
        known = _product(parts[0])
        spaced = text[0].isspace() or not parts[0].isascii() or not parts[0].isalpha()
        if known is not None and (spaced or len(parts[0]) > 1):
            return known
    return _noun(text, parts)


def _product(text: str) -> str | None:
    """Return a product or quotient of known units that is written without spaces."""
    pieces = re.split("([/*·])", text)
    for index in range(0, len(pieces), 2):
        factor = _FACTOR.fullmatch(pieces[index])
        symbol = _symbol(factor[1]) if factor else None
        if factor is None or symbol is None:
            return None
        pieces[index] = symbol + (factor[2] or "")
    return "".join(pieces).replace("·", "*")


def _symbol(word: str) -> str | None:
    if word in UNIT_SYMBOLS:
        return UNIT_SYMBOLS[word]
    lower = word.lower()
    if word.isupper() and len(word) == 2 and lower in UNIT_SYMBOLS:
        return UNIT_SYMBOLS[lower]
    if lower in _ABBREVIATED:
        return _ABBREVIATED[lower]
    if word[0] == "°":
        return f"°{word[1].upper()}" if lower in _DEGREES else None
    for name in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if len(name) >= _SHORTEST_WORD and name in UNIT_SYMBOLS:
            return UNIT_SYMBOLS[name]
    return None


def _noun(text: str, parts: list[str]) -> str | None:
    if not text[0].isspace() or len(parts) > 3:
        return None
    if not all(part.isalpha() and len(part) >= _SHORTEST_WORD for part in parts):
        return None
    last = parts[-1].lower()
    if len(last) > _SHORTEST_WORD and last.endswith("s") and not last.endswith("ss"):
        last = last[:-1]
    return " ".join([*(part.lower() for part in parts[:-1]), last])
