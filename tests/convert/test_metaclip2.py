"""MetaCLIP 2 of transformers, both ways: CLIP but for names and the end-of-text token."""

import hf
import pytest
from clips import CONFIGS, TEXT, check_classifier, check_pair, check_text, check_vision

transformers = hf.transformers()
pytestmark = pytest.mark.torch

# In the published models the end-of-text token is number 2, which CLIP takes for the largest id.
ENDS_IN_2 = {**CONFIGS["largest id"], "text_config": {**TEXT, "eos_token_id": 2}}


@pytest.mark.parametrize("name", ["as published", "unlike towers", "partial patches", "2"])
def test_both_towers(name, tmp_path):
    # What it computes is CLIP: one config's gradients are enough.
    check_pair("MetaClip2", (CONFIGS | {"2": ENDS_IN_2})[name], tmp_path, gradients=name == "2")


@pytest.mark.parametrize(("tower", "projected"), [(check_vision, True), (check_text, False)])
def test_one_tower(tower, projected, tmp_path):
    tower("MetaClip2", projected, tmp_path)


def test_classifier(tmp_path):
    check_classifier("MetaClip2", tmp_path)
