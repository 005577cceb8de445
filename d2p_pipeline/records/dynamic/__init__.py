"""Records whose columns come from a JSON Schema or, without one, from the records of a batch.

schema.py     JSON Schema → columns and validator; refuses what no column can hold
infer.py      records → columns that hold all of them
columns.py    columns → Arrow types, the strict type of a line that fits, and the rewriting of one that does not
normalize.py  one record: checked, its key, its line
parse.py      chunks → table
"""
