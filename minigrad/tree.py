"""Nested containers: dicts, lists, tuples and named tuples of arrays, seen as a list of leaves.

Parameters, gradients and optimiser states are such trees. None is a tree without leaves; anything
else that is not a container is a leaf. Dicts are visited in the order of their sorted keys, so that
two dicts with the same keys match whatever the order they were built in.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Treedef", "flatten", "leaves", "map", "paths", "unflatten"]


class Treedef(NamedTuple):
    """The structure of a tree: its container type (None for a leaf), keys and children."""

    kind: type | None
    keys: Sequence = ()
    children: tuple = ()

    def __str__(self):
        if self.kind is None:
            return "*"
        if self.kind is type(None):
            return "None"
        inner = [str(c) for c in self.children]
        if self.kind is dict:
            return "{" + ", ".join(f"{k!r}: {c}" for k, c in zip(self.keys, inner)) + "}"
        if self.kind is list:
            return f"[{', '.join(inner)}]"
        if self.kind is tuple:
            return f"({', '.join(inner)}{',' * (len(inner) == 1)})"
        return f"{self.kind.__name__}({', '.join(f'{k}={c}' for k, c in zip(self.keys, inner))})"


LEAF = Treedef(None)
_NONE = Treedef(type(None))


def flatten(tree):
    """Return the leaves of `tree` as a list, and its `Treedef`.

    >>> flatten({"w": 1.0, "b": (2.0, None)})[0]
    [2.0, 1.0]
    """
    if type(tree) is np.ndarray:
        return [tree], LEAF
    out = []
    return out, _flatten_into(tree, out)


# An array is known for a leaf before it is asked what kind of container it may be: most nodes are.
def _flatten_into(tree, out):
    kind = type(tree)
    if kind is tuple or kind is list:
        keys, children = range(len(tree)), tree
    elif kind is dict:
        try:
            keys = tuple(sorted(tree))
        except TypeError:
            raise TypeError(
                f"a dict of parameters needs keys that can be sorted, got {list(tree)}; use strings"
            ) from None
        children = [tree[k] for k in keys]
    elif tree is None:
        return _NONE
    elif issubclass(kind, tuple) and hasattr(kind, "_fields"):
        keys, children = kind._fields, tree
    else:
        out.append(tree)
        return LEAF
    treedefs = []
    for child in children:
        if type(child) is np.ndarray:
            out.append(child)
            treedefs.append(LEAF)
        else:
            treedefs.append(_flatten_into(child, out))
    return Treedef(kind, keys, tuple(treedefs))


def unflatten(treedef, leaves):
    """Return the tree of structure `treedef` with the given leaves, in the order of `flatten`."""
    leaves = iter(leaves)
    try:
        tree = _build(treedef, leaves)
    except StopIteration:
        raise ValueError("fewer leaves than the structure has places for") from None
    if next(leaves, LEAF) is not LEAF:
        raise ValueError(f"more leaves than the structure {treedef} has places for")
    return tree


def _build(treedef, leaves):
    kind = treedef.kind
    if kind is None:
        return next(leaves)
    if kind is type(None):
        return None
    children = [next(leaves) if c is LEAF else _build(c, leaves) for c in treedef.children]
    if kind is dict:
        return dict(zip(treedef.keys, children))
    return children if kind is list else tuple(children) if kind is tuple else kind(*children)


def leaves(tree):
    """Return the leaves of `tree` as a list."""
    return flatten(tree)[0]


def map(f, tree, *rest):
    """Return the tree of `f(leaf, *leaves of rest)`; all trees must have the same structure.

    >>> map(lambda p, g: p - 0.5 * g, {"w": 1.0}, {"w": 4.0})
    {'w': -1.0}
    """
    first, treedef = flatten(tree)
    columns = [first]
    for i, other in enumerate(rest):
        column, otherdef = flatten(other)
        if otherdef != treedef:
            raise TypeError(f"tree {i + 1} does not match the first: {otherdef} against {treedef}")
        columns.append(column)
    return unflatten(treedef, [f(*row) for row in zip(*columns)])


def paths(tree):
    """Return the path of each leaf, such as "encoder/0/w", in the order of `flatten`.

    >>> paths({"encoder": [{"w": 1.0, "b": 2.0}]})
    ['encoder/0/b', 'encoder/0/w']
    """
    return list(_paths(flatten(tree)[1], ""))


def _paths(treedef, prefix):
    if treedef.kind is None:
        yield prefix
    for key, child in zip(treedef.keys, treedef.children):
        yield from _paths(child, f"{prefix}/{key}" if prefix else str(key))
