"""ruDALL-E and minDALL-E are told by `inspect`, with what is missing, and refused by `import`."""

import json

import pytest
import torch

from training import legacy


def rudalle(width=16, num_layers=3, text_length=8, grid_size=4, codes=24, num_words=40):
    """Weights by the names of ru-dalle (rudalle/dalle/model.py and transformer.py)."""
    shapes = {
        "text_embeddings.weight": (num_words, width),
        "image_embeddings.weight": (codes, width),
        "text_pos_embeddings.weight": (text_length + 1, width),
        "image_row_embeddings.weight": (grid_size, width),
        "image_col_embeddings.weight": (grid_size, width),
        "to_logits.0.weight": (width,),
        "to_logits.1.weight": (num_words + codes, width),
        "transformer.final_layernorm.weight": (width,),
        "transformer.row_mask": (24, 24),
    }
    for layer in range(num_layers):
        start = f"transformer.layers.{layer}."
        shapes[f"{start}before_first_addition_layernorm.weight"] = (width,)
        shapes[f"{start}attention.query_key_value.weight"] = (3 * width, width)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def mindalle(width=16, num_layers=2):
    """Weights by the names of minDALL-E (dalle/models/stage2/transformer.py)."""
    shapes = {
        "tok_emb_img.weight": (24, width),
        "tok_emb_txt.weight": (40, width),
        "pos_emb_img.weight": (16, width),
        "pos_emb_txt.weight": (8, width),
        "ln_f.weight": (width,),
        "head_img.weight": (24, width),
        "head_txt.weight": (40, width),
    }
    for layer in range(num_layers):
        shapes[f"blocks.{layer}.attn.key.weight"] = (width, width)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def inspect(content, tmp_path, capsys, *options):
    torch.save(content, tmp_path / "model.pt")
    assert legacy.main(["inspect", str(tmp_path / "model.pt"), *options]) == 0
    return capsys.readouterr().out


SIZES = {"width": 16, "text_length": 8, "grid_size": 4, "image_codes": 24}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_rudalle_is_named_with_its_sizes_and_what_is_missing(prefix, tmp_path, capsys):
    content = {prefix + name: value for name, value in rudalle().items()}
    found = json.loads(inspect(content, tmp_path, capsys, "--json"))
    assert found["kind"] == "ruDALL-E of another size"
    assert found["sizes"] == SIZES | {"layers": 3, "text_vocabulary": 32}
    assert found["attention"] == ["axial_row", "axial_col", "conv_like"]
    assert [each.split(",")[0] for each in found["missing"]] == [
        "its tokenizer",
        "its image tokenizer",
    ]
    assert "sandwich norm" in found["notes"]
    assert found["refused"].startswith("it is not imported: its GELU is computed by tanh")


@pytest.mark.parametrize("prefix", ["", "stage2."])
def test_mindalle_is_named_with_its_sizes_and_what_is_missing(prefix, tmp_path, capsys):
    state = {prefix + name: value for name, value in mindalle().items()}
    found = json.loads(inspect({"state_dict": state, "epoch": 3}, tmp_path, capsys, "--json"))
    assert found["kind"] == "minDALL-E of another size"
    assert found["sizes"] == SIZES | {"layers": 2, "text_vocabulary": 40}
    assert found["attention"] == ["full", "full"]
    assert found["missing"][1].endswith("a VQGAN with 24 codes: stage1_last.ckpt")


def test_the_published_sizes_have_names(tmp_path, capsys):
    malevich = rudalle(2048, 24, text_length=1, grid_size=1, codes=1, num_words=2)
    for name in [name for name in malevich if "query_key_value" in name]:
        malevich[name] = torch.zeros(1)
    said = inspect(malevich, tmp_path, capsys)
    assert "kind              ruDALL-E Malevich (1.3 B), or one trained on from it, such" in said
    large = {name: value[:1] for name, value in mindalle(1536, 0).items()}
    large |= {f"blocks.{layer}.ln1.weight": torch.zeros(1) for layer in range(42)}
    assert "kind              minDALL-E (1.3 B)" in inspect(large, tmp_path, capsys)


@pytest.mark.parametrize(("content", "name"), [(rudalle, "ruDALL-E"), (mindalle, "minDALL-E")])
def test_import_refuses_them_by_name_with_the_reason(content, name, tmp_path, capsys):
    torch.save(content(), tmp_path / "model.pt")
    arguments = ["import", str(tmp_path / "model.pt"), "--out", str(tmp_path / "out")]
    assert legacy.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"model.pt: it is {name} of another size, which is not imported: it")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "gone", "says"),
    [
        (rudalle, "image_embeddings.weight", "there is no weight 'image_embeddings.weight'"),
        (mindalle, "pos_emb_img.weight", "there is no weight 'pos_emb_img.weight'"),
    ],
)
def test_a_part_of_one_is_refused_by_the_weight_that_is_missing(
    content, gone, says, tmp_path, capsys
):
    state = content()
    del state[gone]
    torch.save(state, tmp_path / "model.pt")
    assert legacy.main(["inspect", str(tmp_path / "model.pt")]) == 2
    assert f"model.pt: {says}" in capsys.readouterr().err
