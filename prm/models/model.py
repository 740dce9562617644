"""The reward model: a transformers model, its tokenizer and image processor, its step logits."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from prm.conventions import FILE, Conventions, write_conventions
from prm.files import atomic_write
from prm.inputs.collate import TREE_POSITIONS, Batch, Collator
from prm.inputs.image_inputs import image_inputs, image_tokens
from prm.inputs.prompt import PromptEncoder
from prm.inputs.tiles import CACHE_BYTES
from prm.inputs.tokens import ImageTokens, label_tokens
from prm.models.activation_checkpointing import checkpointed
from prm.models.adapters import merged
from prm.models.boundary import FROZEN_STATES, Boundary, going_on
from prm.models.chat_templates import check_terminates
from prm.models.native import (
    load_config,
    load_conventions,
    load_image_processor,
    load_model,
    load_tokenizer,
    write_processor_config,
)
from prm.models.no_waits import attention_mask, count_image_tokens_on_cpu_only
from prm.models.untrusted import ModelError, reading
from prm.models.weight_files import write_digests
from prm.names import Context, TooLong

Params = dict[str, Tensor]

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Names of the model input that marks the tokens of an image; few models have it."""
_OF_TREES = ("llama", "qwen2", "qwen3")
"""Types of language models that attend as a mask says, whatever the tokens, and turn by places."""
_TARGETS = frozenset({"labels"})  # Some base models would take these entries of a batch as inputs.


@dataclass(frozen=True, eq=False)
class PRM:
    """A process reward model, whose parameters are passed separately, as a dict by name.

    ``autocast``, ``activation_checkpointing``, ``boundary``, ``front``, ``conventions`` and
    ``spread`` are set by ``dataclasses.replace``.

    Attributes:
        model: An ``AutoModelForImageTextToText`` or ``AutoModelForCausalLM``. Its own parameters do
            not require gradients and keep the values that were loaded.
        tokenizer: The fast tokenizer, with a chat template.
        image_processor: The image processor for InternVL and Qwen2-VL, the whole processor for
            other models with images, and None for a text-only model.
        image_tokens: The tokens of an image in the text. None for a text-only model.
        plus_id: The token id of "+".
        minus_id: The token id of "-".
        autocast: The dtype in which the body of the model computes. The head computes in the dtype
            of the parameters, and with None the body does, too.
        activation_checkpointing: Whether layers are recomputed in the backward pass instead of
            storing their activations (``prm.models.activation_checkpointing``). With "vision",
            those in front of the language model are.
        boundary: Where the frozen front of the model ends, if its activations are kept. A batch
            that holds them (``prm.activations.batches``) is computed from there.
        front: What puts kept activations of the frozen front into a batch on the host. Passes over
            many examples, as in ``prm.scoring``, call it; None means that each computes the front.
        conventions: How the model was trained to be asked; ``save_prm`` writes them beside it. None
            means that its folder does not say.
        spread: ``step_head`` of this model as a function of parameters, batch and rows, if it is
            spread over processes (``bilevel.sharded``). All of them call it together.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    image_tokens: ImageTokens | None
    plus_id: int
    minus_id: int
    autocast: torch.dtype | None = None
    activation_checkpointing: bool | Literal["vision"] = False
    boundary: Boundary | None = None
    front: Callable[[Batch], Batch] | None = None
    conventions: Conventions | None = None
    spread: (
        Callable[[Mapping[str, Tensor], Mapping[str, Tensor], list[int] | None], Tensor] | None
    ) = None

    @property
    def usage(self) -> Conventions:
        """How the model is asked: by its own conventions, or else by the library's defaults."""
        return self.conventions or Conventions(plus_id=self.plus_id, minus_id=self.minus_id)

    @property
    def tree_width(self) -> int | None:
        """The hidden size of a language model that computes trees of tokens, else None.

        See ``prm.batches.prefix_trees``. A model that is spread over processes does not, nor one
        whose frozen front is kept, by example.
        """
        if self.spread is not None or self.boundary is not None or self.front is not None:
            return None
        return tree_width(self.model.config)

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        device: torch.device = self.model.device
        return device

    def collator(
        self,
        *,
        context: Context | None = None,
        system_prompt: str | EllipsisType | None = ...,
        max_patches: int | None = None,
        max_length: int | Literal["model"] | None = "model",
        too_long: TooLong = "refuse",
        index: Mapping[str, int] | None = None,
        domains: Mapping[str, int] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> Collator:
        """Return a ``Collator`` for this model, by its ``usage`` unless told otherwise.

        Args:
            context: The content of earlier assistant slots (``prm.names.Context``). Use the same to
                train and to score. None means the model's own.
            system_prompt: The text of the system turn. None means no system turn, and ``...`` the
                model's own.
            max_patches: The largest number of tiles per image, without the thumbnail, in units of
                256 tokens. None means the model's own, or else the image processor's number.
            max_length: The longest accepted sequence in tokens. None means any length, and "model"
                the number of positions of the model.
            too_long: What a longer one leads to: an error, or that as many whole steps as fit are
                kept from its start. An encoded example then has these steps alone.
            index: The numbers of the examples, as in ``Collator``.
            domains: The numbers of the domains, as in ``Collator``.
            cache_bytes: The limit of the cache of image inputs in bytes.

        Raises:
            ValueError: The tokenizer, its template or the image processor is not supported.
        """
        usage = self.usage
        if max_length == "model":
            text_config = self.model.config.get_text_config()
            max_length = getattr(text_config, "max_position_embeddings", None)
        prompt = PromptEncoder(
            self.tokenizer,
            image_tokens=self.image_tokens,
            context=usage.context if context is None else context,
            system_prompt=(
                usage.system_prompt if isinstance(system_prompt, EllipsisType) else system_prompt
            ),
            max_length=max_length,
            too_long=too_long,
            chat_template=getattr(self.image_processor, "chat_template", None),
        )
        images = None
        if self.image_processor is not None:
            images = image_inputs(
                self.image_processor,
                max_patches=usage.max_patches if max_patches is None else max_patches,
                cache_bytes=cache_bytes,
            )
        accepted = inspect.signature(self.model.base_model.forward).parameters
        names = [name for name in TOKEN_TYPES if name in accepted]
        token_types = names[0] if names and self.image_tokens else None
        return Collator(prompt, images, token_types=token_types, index=index, domains=domains)


def load_prm(
    path_or_name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
) -> PRM:
    """Load a checkpoint folder or a hub name; remote code is never run, and pickles never read.

    Args:
        path_or_name: A path or name for ``from_pretrained``. It must hold a model, a tokenizer and,
            for a model with images, an image processor.
        dtype: The dtype of the parameters. float32 keeps small updates that bfloat16 would round
            away.
        attn_implementation: The attention, such as "eager" or "sdpa". None means transformers'
            choice.
        device: The device to which the parameters are moved.

    A name is looked up on the hub only if it is written ``organisation/model`` and there is no
    local folder ``organisation``: a mistyped path must not reach the network.

    Raises:
        FileNotFoundError: There is no such folder, and the name cannot be one on a hub; or the
            folder lacks its configuration or safetensors files.
        ModelError: The checkpoint cannot be used as a process reward model: tensors are missing,
            left over, of another shape or not finite, a file is damaged or has changed since it was
            written here, or the model is of another kind. It is a ``ValueError``.
        DataError: The conventions beside the model are damaged, of a newer version, or not those of
            its tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    name = str(path_or_name)
    is_path = isinstance(path_or_name, Path) or not is_hub_name(name)
    if is_path and not (name and Path(name).is_dir()):
        found = "a file" if Path(name).exists() else "nothing there"
        raise FileNotFoundError(
            f"expected a checkpoint folder at {name}, found {found}; a name on a hub is written "
            "organisation/model"
        )
    config = load_config(name)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not sees and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"expected an image-text-to-text or causal language model, found {name} of type "
            f"{config.model_type!r}"
        )
    tokenizer = load_tokenizer(name)
    image_processor = load_image_processor(name, tokenizer, config) if sees else None
    for part in (tokenizer, image_processor):
        check_terminates(getattr(part, "chat_template", None), name)
    model = load_model(
        AutoModelForImageTextToText if sees else AutoModelForCausalLM,
        name,
        config,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    with reading(f"the model in {name}"):
        prm = make_prm(model.to(device), tokenizer, image_processor)
    return replace(prm, conventions=load_conventions(name, prm.plus_id, prm.minus_id))


def is_hub_name(name: str) -> bool:
    """Return whether ``name`` can only be a model on a hub, not a local path that is missing."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return False
    return not Path(name.partition("/")[0]).exists()


def make_prm(model: Any, tokenizer: Any, image_processor: Any = None) -> PRM:
    """Build a ``PRM`` from parts that exist already.

    The model is set to evaluation mode (no dropout), and its parameters no longer require
    gradients: gradients flow to the parameters that are passed to ``step_logits``.

    Raises:
        ValueError: "+" or "-" is not one token, the image tokens are not known, or the model does
            more than apply its head to the last hidden state.
    """
    labels = label_tokens(tokenizer)
    model.eval().requires_grad_(False)
    if model.config.model_type == "internvl":
        count_image_tokens_on_cpu_only(model.base_model, model.config.image_token_id)
    _check_head(model, labels.plus_id)
    return PRM(
        model=model,
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_tokens=(
            None
            if image_processor is None
            else image_tokens(image_processor, tokenizer, model.config)
        ),
        plus_id=labels.plus_id,
        minus_id=labels.minus_id,
    )


def save_prm(prm: PRM, params: Mapping[str, Tensor], directory: str | Path) -> None:
    """Write a folder that plain transformers ``from_pretrained`` loads; adapters are merged.

    The folder also holds ``model.sha256``, the digests of the weights and the tokenizer, which
    ``load_prm`` compares, and ``prm.json``, the conventions of the model if it has any.

    Args:
        prm: The model, its tokenizer and its image processor.
        params: Values by parameter name. Parameters that are not named keep the model's values.
            They are written in the dtype of ``prm.model``, which is not changed.
        directory: The folder to write, which must be missing or empty. It appears only when
            complete.

    Raises:
        FileExistsError: ``directory`` is not empty.
        ValueError: A name is no parameter of the model, or transformers would load the saved
            tokenizer as a different one.
    """
    directory = Path(directory)
    _check_empty(directory)
    state = {name: value.cpu() for name, value in prm.model.state_dict().items()}
    for name, aliases in _named_tensors(prm.model, params).items():
        for alias in aliases:
            state[alias] = params[name].detach().to(state[alias])
    save_state(prm, merged(prm.model, state), directory)


def save_state(prm: PRM, state: Mapping[str, Tensor], directory: str | Path) -> None:
    """Write such a folder with the tensors of a whole state dict, of which it makes no copy.

    Args:
        prm: The model, whose own tensors are not read.
        state: What ``prm.model.state_dict()`` is, without adapters.
        directory: As of ``save_prm``.

    Raises:
        FileExistsError: ``directory`` is not empty.
        ValueError: transformers would load the saved tokenizer as a different one.
    """
    directory = Path(directory)
    _check_empty(directory)
    with atomic_write(directory) as unfinished:
        prm.model.save_pretrained(unfinished, state_dict=dict(state))
        prm.tokenizer.save_pretrained(unfinished)
        if prm.image_processor is not None:
            prm.image_processor.save_pretrained(unfinished)
            write_processor_config(unfinished, prm.model.config, prm.image_processor)
        if prm.conventions is not None:
            write_conventions(unfinished / FILE, prm.conventions)
        write_digests(unfinished)
        _check_saved_tokenizer(prm.tokenizer, unfinished)


def _check_empty(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; remove it or choose another")


def split_parameters(model: nn.Module, freeze: Sequence[str] = ()) -> tuple[Params, Params]:
    """Return the trainable and the frozen parameters of ``model``, detached, each tensor once.

    Args:
        model: The model, such as ``prm.model``.
        freeze: Parts to freeze by dotted name, from any level: "vision_tower" freezes
            ``model.vision_tower.*``, "language_model.layers.0" one layer. A tensor with several
            names (tied head) is listed by its first name and is frozen if any of its names is.

    Returns:
        Two dicts by parameter name, (trainable, frozen).

    Raises:
        ValueError: An entry of ``freeze`` names nothing in the model.
    """
    trainable: Params = {}
    frozen: Params = {}
    used: set[str] = set()
    for names, parameter in _aliases(model):
        hits = {part for part in freeze for name in names if f".{part}." in f".{name}."}
        used |= hits
        (frozen if hits else trainable)[names[0]] = parameter.detach()
    unused = [part for part in freeze if part not in used]
    if unused:
        parts = sorted({name.rpartition(".")[0] for names, _ in _aliases(model) for name in names})
        raise ValueError(
            f"expected names of parts of the model, found {', '.join(map(repr, unused))}; "
            f"its parts are {', '.join(parts[:12])}{', ...' if len(parts) > 12 else ''}"
        )
    return trainable, frozen


def step_logits(
    prm: PRM,
    params: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    *,
    full_vocab: bool = False,
    label_rows: bool = False,
) -> Float[Tensor, "batch steps 2"]:
    """Return the logits of "+" and "-" at every step.

    Cost: one forward pass of the body; the head is applied at the label positions only.

    Args:
        prm: The model.
        params: Values by parameter name. Parameters that are not named keep the model's values.
        batch: The batch, from a ``Collator``: padding is on the right. Or one of trees
            (``prm.batches.prefix_trees``).
        full_vocab: Whether to normalise over the whole vocabulary, as DreamPRM-1.5 does. The result
            is then the log-probabilities of the two labels instead of their logits.
        label_rows: Whether to multiply by the head's rows of "+" and "-" only, in float32 or wider,
            which saves the rest of the vocabulary in scoring. The result is the same up to
            rounding. It has no effect if the head is not a plain linear layer. Training leaves it
            off, so that the head is one call of its module, which per-example rules can hook.

    Returns:
        Logits [batch, steps, 2] in the columns "+" and "-", in float32 or the model's dtype if that
        is wider. Padded steps hold arbitrary finite values; ``batch["step_mask"]`` marks the
        others.
    """
    if full_vocab and label_rows:
        raise ValueError("label_rows leaves out the vocabulary that full_vocab is over; give one")
    labels = [prm.plus_id, prm.minus_id]
    keep_all = not (prm.activation_checkpointing and torch.is_grad_enabled())
    vision_only = prm.activation_checkpointing == "vision"
    recomputed = nullcontext() if keep_all else checkpointed(prm.model, vision_only=vision_only)
    rows = labels if label_rows else None
    with _from_boundary(prm, batch), recomputed:
        if prm.spread is not None:  # functional_call would not reach its parameters
            logits = prm.spread(params, batch, rows)
        else:
            named = {f"model.{name}": value for name, value in params.items()}
            logits = functional_call(step_head(prm), named, (batch, rows))
    wide = torch.promote_types(logits.dtype, torch.float32)
    if logits.shape[-1] == len(labels):
        return logits.to(wide)
    if full_vocab:
        logits = logits.log_softmax(-1, dtype=wide)
    return torch.stack([logits[..., label] for label in labels], dim=-1).to(wide)


def step_head(prm: PRM) -> nn.Module:
    """Return the module ``(batch, rows) -> logits`` at the label positions, [batch, steps, vocab].

    Its parameters are those of ``prm.model``, under ``model.``. With ``rows`` the logits are those
    of these rows of the vocabulary alone, if the head is a plain linear layer.
    """
    return _StepHead(prm.model, prm.autocast)


def body_autocast(model: Any, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return the context in which the body of a model computes: autocast to ``dtype``, if any."""
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype=dtype)


def _from_boundary(prm: PRM, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Return the context in which a pass goes on from the activations of a batch that holds any."""
    if FROZEN_STATES not in batch:
        return nullcontext()
    if prm.boundary is None:
        raise ValueError(
            f"expected a model with the boundary at which the {FROZEN_STATES} of the batch stand, "
            "found none; set PRM.boundary"
        )
    return going_on(prm.model, prm.boundary, batch[FROZEN_STATES])


class _StepHead(nn.Module):
    """The base model and the head at the label positions, as a module for ``functional_call``."""

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, batch: Mapping[str, Tensor], rows: list[int] | None) -> Tensor:
        base = self.model.base_model
        accepted = inspect.signature(base.forward).parameters
        inputs: dict[str, Any] = {
            key: batch[key] for key in batch if key in accepted and key not in _TARGETS
        }
        if "attention_mask" in inputs:
            inputs["attention_mask"] = attention_mask(self.model, inputs["attention_mask"])
        with body_autocast(self.model, self.autocast):
            hidden = base(**inputs, use_cache=False).last_hidden_state  # [batch, seq, hidden]
        if TREE_POSITIONS in batch:
            read = hidden.flatten(0, 1)[batch[TREE_POSITIONS]]
        else:
            read = torch.take_along_dim(hidden, batch["label_positions"][..., None], dim=1)
        head = self.model.get_output_embeddings()
        if self.autocast is not None:
            read = read.to(self.model.dtype)  # In bfloat16, with 8 bits, many scores would tie.
        if rows is not None and type(head) is nn.Linear:
            wide = torch.promote_types(read.dtype, torch.float32)
            bias = None if head.bias is None else head.bias[rows].to(wide)
            weight = head.weight[rows].to(wide)
            return nn.functional.linear(read.to(wide), weight, bias)  # [batch, steps, 2]
        logits: Tensor = head(read)  # [batch, steps, vocab]
        return logits


def tree_width(config: Any) -> int | None:
    """Return the hidden size of a language model that computes trees of tokens, else None.

    See ``prm.batches.prefix_trees``. One with full causal attention by torch's kernels does.
    Others would need more than a mask and places: sliding windows, pictures whose tokens see each
    other, places of more than one axis.

    Args:
        config: The configuration of a model.
    """
    text = config.get_text_config()
    takes = (
        text.model_type in _OF_TREES
        and config.model_type in ("internvl", text.model_type)
        and text._attn_implementation == "sdpa"
        and set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )
    return int(text.hidden_size) if takes else None


def _check_head(model: Any, token_id: int) -> None:
    """Refuse models that do more to a hidden state than the head (logit scaling, soft caps)."""
    rows = model.get_input_embeddings().num_embeddings
    if token_id >= rows:
        raise ValueError(
            f"expected a tokenizer whose tokens the model embeds, found id {token_id} and {rows} "
            "embeddings; tokenizer and model do not belong together"
        )
    ids = torch.tensor([[token_id, token_id]], device=model.device)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        head = model.get_output_embeddings()
        direct = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not direct.isfinite().all():
        raise ValueError(
            f"expected finite logits for two tokens, found NaN or infinite ones; the weights of "
            f"this {type(model).__name__} are damaged, or its training had diverged"
        )
    if not torch.equal(whole.to(direct.dtype), direct):
        raise ValueError(
            f"expected a model whose logits are its head applied to its last hidden state; "
            f"{type(model).__name__} changes them further; such models are not supported"
        )


def _check_saved_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Refuse a tokenizer for which transformers would load another class than the saved one."""
    from transformers import AutoTokenizer

    probe = [{"role": "user", "content": "### Question:\nWhat is 3 + 4?\n\nIt is 7."}]
    text = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    before, after = (
        each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, loaded)
    )
    if before != after:
        raise ValueError(
            f"expected a tokenizer that loads back as it is, but from_pretrained makes a "
            f"{type(loaded).__name__} of it for this type of model and tokenizes differently; use "
            "the tokenizer class that belongs to the model type"
        )


def _aliases(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Return every parameter with all its names, in the model's order."""
    by_identity: dict[int, tuple[list[str], Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(by_identity.values())


def _named_tensors(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return all names of the tensor of every name in ``params``."""
    aliases = {name: names for names, _ in _aliases(model) for name in names}
    unknown = [name for name in params if name not in aliases]
    if unknown:
        raise ValueError(f"expected names of parameters of the model, found {unknown[0]!r}")
    return {name: aliases[name] for name in params}
