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
        options = {"epochs": 1}
        channel.send(mine, {"type": "start", "feeds": ["train", "other"], "feed_index": 0, "data_options": options})
        spool = channel.memory_file(b"x" * 100)
        channel.send(mine, {"type": "feed_opened", "feed": "train", "schema": "00"}, spool)
        channel.send(mine, {"type": "chunk", "feed": "train", "chunk": [0, 100, 1]})
        channel.send(mine, {"type": "feed_ended", "feed": "train", "rows_per_node": [1]})
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
