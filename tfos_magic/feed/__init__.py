"""The feed: DataFrame rows travel as Arrow chunks from ordinary Spark tasks to the nodes, once, and are cached there.

Runs on: anywhere; importing it imports nothing heavy::

    driver        prepare    choose, check and convert the columns
    ──────────────────────────────────────────────────────────────────────────────────────────────
    Spark task    sender     deal the rows evenly over the nodes, wait for every node's word, ask the driver
                     │       TCP, authenticated (wire); each chunk is one Arrow IPC message
    agent         receiver   write the chunks to an unlinked file (spool); publish those of the attempt that counts
                     │       the file's descriptor once, then (offset, length, rows) per chunk
    child         source     memory-map the chunks; wait for more; count
                     ├── columns → dataset    tf.data.Dataset of batches, repeatable, shuffled
                     └── datafeed             TensorFlowOnSpark's ``DataFeed``
"""
