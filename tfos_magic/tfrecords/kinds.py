"""Which DataFrame column is which kind of feature.

Runs on: driver and executors.

==========================================  ============  =========================================================
column in Spark                             feature       read back, where nothing says otherwise
==========================================  ============  =========================================================
boolean, byte, short, integer, long         Int64List     long
float, double                               FloatList     double; a FloatList holds 32 bits, so a double is rounded
string                                      BytesList     string
binary                                      BytesList     string, or binary (``binary_features``, or not UTF-8)
array of one of these                       that list     array, if any record seen has more than one value
ML vector, dense or sparse                  FloatList     as array<float>
null                                        left out      null
empty array                                 empty list    empty array
==========================================  ============  =========================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tfos_magic.errors import DataError

INT64, FLOAT, BYTES = "int64", "float", "bytes"
_ARROW_TYPES = {
    "boolean": (INT64, "bool"),
    "tinyint": (INT64, "int8"),
    "smallint": (INT64, "int16"),
    "int": (INT64, "int32"),
    "bigint": (INT64, "int64"),
    "long": (INT64, "int64"),  # TFoS takes this name too
    "float": (FLOAT, "float32"),
    "double": (FLOAT, "float64"),
    "string": (BYTES, "string"),
    "binary": (BYTES, "binary"),
}
_ARRAY = re.compile(r"array<(.*)>", re.DOTALL)
_HINTS = {
    "decimal": 'Cast it: df.withColumn("{name}", df["{name}"].cast("double")).',
    "date": 'Cast it: df.withColumn("{name}", df["{name}"].cast("string")), or F.unix_date("{name}") for days.',
    "timestamp": 'Cast it: df.withColumn("{name}", df["{name}"].cast("double")) gives seconds since 1970.',
    "struct": 'Take its fields out: df.select("*", "{name}.*").drop("{name}").',
    "map": 'Take values out by key: df.withColumn("a", df["{name}"]["a"]).drop("{name}").',
    "array": 'Flatten it: df.withColumn("{name}", F.flatten("{name}")); cast its elements to double, long or string.',
}
_HINT = 'Cast or drop it: df.withColumn("{name}", df["{name}"].cast("string")), df.drop("{name}").'


@dataclass(frozen=True)
class Column:
    """A DataFrame's column that is a feature.

    Attributes
    ----------
    name : str
    kind : str
        ``int64``, ``float`` or ``bytes``: the list that a feature holds.
    arrow_type : str
        Arrow's name for the type of one value.
    is_list : bool
        False for one value or none.
    """

    name: str
    kind: str
    arrow_type: str
    is_list: bool

    @classmethod
    def of(cls, name: str, type_name: str) -> Column:
        """Return the column of this name and type, as ``df.dtypes`` gives them.

        Raises
        ------
        DataError
            The type is no feature.
        """
        array = _ARRAY.fullmatch(type_name)
        element = array[1] if array else type_name
        # Spark 4 writes a collation after the type.
        kind = _ARROW_TYPES.get("string" if element.startswith("string ") else element)
        if kind is None:
            family = re.match(r"[a-z]*", type_name)
            hint = _HINTS.get(family[0].removesuffix("_ntz").removesuffix("_ltz") if family else "", _HINT)
            raise DataError(
                f"Column '{name}' has the type {type_name}, which no TensorFlow feature can hold.",
                cause="A feature is a list of integers, of floats or of byte strings.",
                hint=hint.format(name=name),
            )
        return cls(name, *kind, array is not None)
