"""Purity: whether what was traced changes nothing, so that it may run twice, or beside itself."""

import tensorflow as tf

# Operations on a state that they leave as it is.
_READS = ("ReadVariableOp", "ResourceGather")
# Operations that run what is not seen here: Python, where two threads have never been before; or
# functions, whose own operations may be of this kind.
_HIDES = ("PyFuncStateless", "PartitionedCall", "StatelessIf", "StatelessWhile", "StatelessCase")


def is_pure(graph: tf.Graph) -> bool:
    """Whether no operation changes a state, draws from a generator that has one, or may do so."""
    return not any(
        (operation.op_def.is_stateful and operation.type not in _READS) or operation.type in _HIDES
        for operation in graph.get_operations()
    )
