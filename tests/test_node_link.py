from __future__ import annotations

import subprocess
import sys
import textwrap


def test_the_links_threads_import_nothing() -> None:
    # The main thread imports TensorFlow at the same time: two threads that import can wait for each other for ever.
    code = """
        import os, sys, threading
        from tfos_magic.node import channel
        from tfos_magic.node.link import Link

        mine, theirs = channel.pair()
        before = set(sys.modules)
        link = Link(theirs)
        data = {"epochs": 1, "seed": None}
        start = {"feeds": ["train", "other"], "queues": ["input"], "feed_index": 0, "data_options": data}
        channel.send(mine, {"type": "start", **start})
        spool = channel.memory_file(b"x" * 100)
        channel.send(mine, {"type": "feed_opened", "feed": "train", "schema": "00"}, spool)
        channel.send(mine, {"type": "chunk", "feed": "train", "chunk": [0, 100, 1], "partition": 0})
        channel.send(mine, {"type": "feed_announced", "feed": "input/1", "queue": "input"})
        channel.send(mine, {"type": "feed_opened", "feed": "input/1", "schema": ""}, channel.memory_file(b"y" * 100))
        channel.send(mine, {"type": "chunk", "feed": "input/1", "chunk": [0, 100, 1], "session": None})
        channel.send(mine, {"type": "partition_ended", "feed": "input/1", "session": None})
        channel.send(mine, {"type": "chunk", "feed": "input/1", "chunk": [0, 100, 1], "session": 7})
        channel.send(mine, {"type": "session_lost", "feed": "input/1", "session": 7})
        channel.send(mine, {"type": "feed_ended", "feed": "input/1", "rows_per_node": [0]})
        channel.send(mine, {"type": "queue_finish", "queue": "input"})
        channel.send(mine, {"type": "queue_stop", "queue": "input"})
        channel.send(mine, {"type": "feed_ended", "feed": "train", "rows_per_node": [1], "fingerprint": 0})
        channel.send(mine, {"type": "feed_failed", "feed": "other", "message": "a test"})
        while channel.receive(mine).type != "counters":
            pass
        channel.send(mine, {"type": "exit"})
        link.wait_exit()
        print("imported", sorted(set(sys.modules) - before))
        sys.stdout.flush()
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "imported []\n", done


def test_the_line_that_a_node_is_at_is_told_from_its_channels_thread() -> None:
    code = """
        import os, sys, threading, time
        from tfos_magic.node import channel
        from tfos_magic.node.link import Link

        def busy():
            entered.set()
            while not done:
                time.sleep(0.01)

        mine, theirs = channel.pair()
        link = Link(theirs)
        start = {"feeds": [], "queues": [], "feed_index": 0, "data_options": {"epochs": 1, "seed": None}}
        channel.send(mine, {"type": "start", **start})
        answers, done, entered = [], [], threading.Event()

        def listen():
            entered.wait()
            channel.send(mine, {"type": "where"})
            while (note := channel.receive(mine)).type != "where":
                pass
            answers.append(note.header["text"])
            done.append(True)

        listener = threading.Thread(target=listen)
        link.wait_start()
        listener.start()
        busy()
        print(answers[0])
        sys.stdout.flush()
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert "<string>, line" in done.stdout, done
