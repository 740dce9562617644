"""Data formats of other projects, one module each, which turn records into examples.

Every module has ``matches(record)``, which tells whether a record looks like its format, and
``read(record, location)``, which returns the examples of a record or raises a ``DataError`` that
names the field. ``prm.data.formats.table`` lists the formats and tells them apart.
"""
