"""A module that driver and executors both have: what a user ships with sc.addPyFile."""

import typing
from collections import namedtuple

Plain = namedtuple("Plain", "x y")


class Circle(namedtuple("Circle", "x y r")):
    """A subclass over a base of its own name, as TensorFlow has them."""

    __slots__ = ()

    def area(self):
        return 3 * self.r**2


class Typed(typing.NamedTuple):
    x: int
    y: int = 7

    def total(self):
        return self.x + self.y


ALL = (Plain(1, 2), Circle(1, 2, 3), Typed(1))
