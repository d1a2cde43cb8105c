"""Nested containers."""

from typing import NamedTuple

import numpy as np
import pytest

from minigrad import tree


class Pair(NamedTuple):
    left: object
    right: object


NESTED = {"b": [np.arange(2), (3.0, None)], "a": Pair(1, {"z": 2, "y": ()})}


def test_flatten_and_unflatten_are_inverse():
    leaves, treedef = tree.flatten(NESTED)
    again = tree.unflatten(treedef, leaves)
    assert tree.flatten(again)[1] == treedef
    assert isinstance(again["a"], Pair) and again["a"].right == {"y": (), "z": 2}
    assert again["b"][1] == (3.0, None)
    assert len(leaves) == 4 and leaves == tree.leaves(NESTED)


def test_dicts_match_whatever_the_order_of_their_keys():
    assert tree.flatten({"a": 1, "b": 2}) == tree.flatten({"b": 2, "a": 1})
    assert tree.map(lambda x, y: x - y, {"a": 1, "b": 5}, {"b": 2, "a": 1}) == {"a": 0, "b": 3}


def test_paths_name_the_leaves_in_order():
    assert tree.paths(NESTED) == ["a/left", "a/right/z", "b/0", "b/1/0"]
    assert tree.paths(3.0) == [""]


def test_wrong_leaf_counts_and_unsortable_keys_are_refused():
    treedef = tree.flatten((1, 2))[1]
    with pytest.raises(ValueError, match="more leaves"):
        tree.unflatten(treedef, [1, 2, 3])
    with pytest.raises(ValueError, match="fewer leaves"):
        tree.unflatten(treedef, [1])
    with pytest.raises(TypeError, match="keys that can be sorted"):
        tree.flatten({1: 2, "a": 3})


def test_a_treedef_prints_as_its_shape():
    assert str(tree.flatten({"w": [1, (2,)], "n": None, "p": Pair(1, 2)})[1]) == (
        "{'n': None, 'p': Pair(left=*, right=*), 'w': [*, (*,)]}"
    )


@pytest.mark.parametrize("extra", [0, None, (), 0.0])
def test_a_leaf_too_many_is_refused_whatever_it_is(extra):
    with pytest.raises(ValueError, match="more leaves"):
        tree.unflatten(tree.flatten((1, 2))[1], [1, 2, extra])
