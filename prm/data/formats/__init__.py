"""Data formats of other projects, one module each: records in, examples out.

Every module has ``matches(record)``, whether a record looks like its format, and
``read(record, place)``, the examples of a record or a ``DataError`` that names the field.
``prm.data.formats.table`` lists them and tells them apart.
"""
