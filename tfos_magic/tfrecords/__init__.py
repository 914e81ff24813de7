"""TFRecord files of ``tf.train.Example`` to and from Arrow, without TensorFlow.

Runs on: executors (Spark tasks); the driver uses `files`, `kinds`, `output` and `summary`.

    task        one Spark task: writes a part file, reads a file, samples a file
     ├ encode   Arrow columns ─► serialized Examples            whole batches at a time
     ├ decode   serialized Examples ─► Arrow columns            whole batches at a time
     ├ example  one Example in plain Python: the odd ones, and samples for the schema
     ├ frames   TFRecord's framing: length, checksum, record, checksum
     ├ rows     the rows of an RDD, for TFoS's toTFExample and fromTFExample
     ├ summary  what some records hold, for the schema
     ├ output   a directory that is whole at once
     ├ kinds    which column is which kind of feature
     └ files    local paths, and what tf.io.gfile opens
    slices      many byte strings in one buffer; what the others pass around
    crc32c      the checksum of many byte strings at once
    varints     protobuf's variable-length integers, many at once

By the batch, with NumPy and Arrow, because that is 4 to 20 times as fast as TensorFlow's protobuf classes record by
record, and spares every Python worker an import of several seconds. On one core, rows a second, checksums included
(``tests/benchmarks/tfrecords.py``):

    three scalars and a list of   written here   by TensorFlow   read here   by TensorFlow
    4 floats                         1,080,000          95,000     500,000          21,000
    784 floats                         118,000          32,000     104,000          13,000
"""
