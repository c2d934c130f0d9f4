"""OPSGRAPH_CHECK=1 asked a user's fuser for the seed of a Dropout, which it had not handed out."""

from opsgraph.testing.fuzz import Life

life = Life()
life.build(8, "Tanh()")
life.verify(True)
life.fuse("dropping")
life.call(mode="no_grad")
life.end()
