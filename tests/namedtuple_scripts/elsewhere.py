"""An executor as far as pickle can tell: another process, without tfos_magic, that loads and sends back."""

import json
import pickle
import sys

import pyspark.serializers  # noqa: F401

with open(sys.argv[1], "rb") as file:
    pickles = pickle.load(file)
found = {}
for name, data in pickles.items():
    value = pickle.loads(data)
    again = pickle.loads(pickle.dumps([value, value]))
    found[name] = {
        "value": list(value),
        "type": type(value).__name__,
        "bases": [base.__name__ for base in type(value).__mro__],
        "total": value.total() if hasattr(value, "total") else None,
        "goes on": [type(other) is type(value) and other == value for other in again],
    }
print(json.dumps({"values": found, "has package": "tfos_magic" in sys.modules}))
