"""One TensorFlow node's life on an executor, from Spark's task to the last process gone.

Runs on: executor.

    launch   in Spark's task: starts the agent, waits for it when the node holds its slot
    agent    own process and session: starts the child, meets the driver, receives data, reports, cleans up
    child    fresh interpreter: patch state clean → TensorFlow → the user's function → result
    link     the child's end of the channel
    context  what the user's function sees as ``ctx``
    channel  messages and file descriptors between agent and child
"""
