import os, subprocess, sys, threading, socket, tempfile, time
import pytest


def test_nothing():
    pass


def test_spark(spark_local4):
    assert spark_local4.range(10).count() == 10
    assert spark_local4.sparkContext.parallelize(range(10), 2).map(lambda x: x * x).sum() == 285
    assert len(spark_local4.range(10).toPandas()) == 10


def test_spark2(spark_local4):
    assert spark_local4.range(10).mapInArrow(lambda it: it, "id long").count() == 10


@pytest.mark.parametrize("master", ["local[2]", "local-cluster[2,2,1024]"])
def test_script(spark_script, master):
    t = time.time()
    r = spark_script(
        """
        from pyspark.sql import SparkSession
        s = SparkSession.builder.getOrCreate()
        print(s.sparkContext.master, s.sparkContext.parallelize(range(4),4).map(lambda x: __import__("socket").gethostname()).collect())
        s.stop()
    """,
        master=master,
    )
    print(r.stdout, r.stderr, time.time() - t)
    assert master in r.stdout


def test_standalone(spark_script, standalone_cluster):
    t = time.time()
    r = spark_script(
        """
        from pyspark.sql import SparkSession
        s = SparkSession.builder.getOrCreate()
        rdd = s.sparkContext.parallelize(range(4),4).barrier()
        from pyspark import BarrierTaskContext
        print(rdd.mapPartitions(lambda it: [(__import__("os").environ.get("SPARK_LOCAL_IP"), BarrierTaskContext.get().localProperties if 0 else 0, __import__("os").getcwd())]).collect())
    """,
        master=standalone_cluster.master_url,
    )
    print(r.stdout, r.stderr, time.time() - t)
    assert "127.0.0.2" in r.stdout and "127.0.0.3" in r.stdout


def test_oldest(spark_script, oldest_python):
    r = spark_script(
        """
        from pyspark.sql import SparkSession
        import pyspark
        s = SparkSession.builder.getOrCreate()
        print(pyspark.__version__, s.sparkContext.parallelize(range(10),2).map(lambda x: x*x).sum())
    """,
        python=oldest_python,
    )
    assert r.stdout.strip() == "3.5.9 285"


def test_tf():
    import tensorflow as tf, keras

    @tf.function
    def f(x):
        if x > 0:
            x = x + 1
        return x

    f(tf.constant(1))
    for b in tf.data.Dataset.from_generator(lambda: iter(range(3)), output_signature=tf.TensorSpec((), tf.int32)):
        pass


def test_leaves():
    subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess,sys; subprocess.Popen([sys.executable,'-c','import time;time.sleep(100)'], start_new_session=True)",
        ]
    ).wait()
    subprocess.Popen(["true"])
    threading.Thread(target=time.sleep, args=(8,), name="mine").start()
    global s
    s = socket.create_server(("127.0.0.1", 0))
    tempfile.mkdtemp(prefix="oops")
    os.environ["X"] = "1"
    os.environ.pop("HOME", None)
