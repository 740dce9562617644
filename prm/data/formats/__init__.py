"""Data formats of other projects, which turn records into examples; a module holds those of a kind.

Every format has a function ``matches(record)``, which tells whether a record looks like it, and
``read(record, location)``, which returns the examples of a record or raises a ``DataError`` that
names the field. ``prm.data.formats.table`` lists the formats and tells them apart.
"""
