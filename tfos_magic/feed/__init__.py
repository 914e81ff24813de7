"""The feed: rows travel in chunks from ordinary Spark tasks to the nodes; datasets are cached there, queues pass once.

Runs on: anywhere; importing it imports nothing heavy::

    driver        prepare    choose, check and convert the columns
    ──────────────────────────────────────────────────────────────────────────────────────────────
    Spark task    sender     deal the rows evenly over the nodes, wait for every node's word, ask the driver
                     │       link: TCP, authenticated; or on the same host, straight into the node's spool
    agent         receiver   find each chunk its place in the spool; publish those of the attempt that counts
                     │       the file's descriptor once, then (offset, length, rows) per chunk
    child         source, stream
                     │       memory-map what is cached, copy what passes; wait for more; count
                     ├── columns → dataset    tf.data.Dataset of batches, repeatable, shuffled
                     └── datafeed             TensorFlowOnSpark's ``DataFeed``
"""
