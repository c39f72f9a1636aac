"""Sentences are read whole or refused, found by file name, and mirrored with their pictures."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from progidiff.errors import ModelError, RequestError
from progidiff.textdiff.sentences import SentenceEncoder, find_sentence, mirror_sentence, read_sentences


def write(folder: Path, text: str, name: str = "text.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_offline_encoder_reads_without_a_hub(encoder: SentenceEncoder):
    tokens, mask = encoder.encode(["The nuclei are evenly distributed.", "Dense."])
    assert tokens.shape[0] == 2
    assert tokens.shape[2] == encoder.features == 384
    assert mask[0].sum() > mask[1].sum() >= 3
    assert torch.isfinite(tokens).all()


def test_a_sentence_alone_has_the_tokens_it_has_in_a_batch(encoder: SentenceEncoder):
    long, short = "The nuclei density in the upper right is high.", "Dense."
    both, mask = encoder.encode([long, short])
    alone, _ = encoder.encode([short])
    assert torch.allclose(both[1][mask[1]], alone[0], atol=1e-5)


def test_nothing_of_a_long_sentence_is_cut_and_one_too_long_is_refused(encoder: SentenceEncoder):
    tokens, mask = encoder.encode(["dense " * 400])
    assert int(mask.sum()) == 402
    assert tokens.shape[1] == 402
    with pytest.raises(RequestError, match="602 tokens, the sentence encoder reads 512 at most"):
        encoder.encode(["dense " * 600])


def test_the_last_word_of_a_sentence_counts(encoder: SentenceEncoder):
    start = "The nuclei in this picture of a stained slide are dense in the upper "
    one, _ = encoder.encode([start + "left"])
    other, _ = encoder.encode([start + "right"])
    assert not torch.allclose(one, other, atol=1e-3)


def test_what_is_no_encoder_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors and no pytorch_model\.bin"):
        SentenceEncoder.load(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        SentenceEncoder.load(tmp_path / "none")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        SentenceEncoder.load(tmp_path)


def write_clinical_bert(folder: Path) -> BertModel:
    """A BERT of toy width as emilyalsentzer/Bio_ClinicalBERT lies on its hub: config.json, vocab.txt, and a pickle of a
    larger model's weights.
    """
    config = BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = BertModel(config).eval()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "model_type": "bert", "architectures": None}), encoding="utf-8"
    )
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dense", "left", "right"]) + "\n", encoding="utf-8"
    )
    weights = {f"bert.{name}": tensor for name, tensor in model.state_dict().items()} | {
        "cls.predictions.bias": torch.zeros(8)
    }
    torch.save(weights, folder / "pytorch_model.bin")
    return model


def test_an_encoder_that_is_only_there_as_bin_is_read_tensors_only(tmp_path: Path):
    model = write_clinical_bert(tmp_path / "bert")
    encoder = SentenceEncoder.load(tmp_path / "bert", "cpu")
    assert (encoder.features, encoder.limit) == (8, 16)
    tokens, mask = encoder.encode(["Dense left"])
    expected = model(input_ids=torch.tensor([[2, 5, 6, 3]])).last_hidden_state
    assert torch.allclose(tokens, expected, atol=1e-5)
    assert mask.all()
    torch.save({f"bert.{n}": t + 1 for n, t in model.state_dict().items()}, tmp_path / "bert" / "pytorch_model.bin")
    assert SentenceEncoder.load(tmp_path / "bert", "cpu").digest != encoder.digest


class Hostile:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_bin_that_holds_more_than_tensors_or_less_than_the_encoder_is_refused(tmp_path: Path):
    model = write_clinical_bert(tmp_path / "bert")
    torch.save({"bert.x": Hostile(tmp_path / "ran")}, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        SentenceEncoder.load(tmp_path / "bert", "cpu")
    assert not (tmp_path / "ran").exists()
    part = {f"bert.{n}": t for n, t in model.state_dict().items() if "attention" not in n}
    torch.save(part, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="lacks 10 weights"):
        SentenceEncoder.load(tmp_path / "bert", "cpu")


@pytest.mark.parametrize("has_safetensors", [False, True])
def test_a_hub_id_is_fetched_and_a_pickle_only_where_there_is_nothing_else(
    has_safetensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, asked = write_clinical_bert(tmp_path / "bert"), []
    if has_safetensors:
        model.save_pretrained(tmp_path / "bert")

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "bert")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    encoder = SentenceEncoder.load("owner/clinical", "cpu")
    assert encoder.source == "owner/clinical"
    assert {name for name, _ in asked} == {"owner/clinical"}
    assert [any(".bin" in pattern for pattern in patterns) for _, patterns in asked] == (
        [False] if has_safetensors else [False, True]
    )
    assert "*.safetensors" in asked[0][1]


def test_a_table_is_read_by_its_column_names(tmp_path: Path):
    assert read_sentences(write(tmp_path, "image,text\na.png,Dense.\nb.png,\n")) == {"a.png": "Dense."}
    assert read_sentences(write(tmp_path, "\ufeffNo,Image,Description\n1,m.png,Two areas\n")) == {"m.png": "Two areas"}
    assert read_sentences(write(tmp_path, 'text;image\n"Left; dense.";a.png\n')) == {"a.png": "Left; dense."}


def test_a_table_without_the_columns_or_with_two_sentences_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="no column 'text'"):
        read_sentences(write(tmp_path, "image,remark\na.png,x\n"))
    with pytest.raises(RequestError, match="no column 'image'"):
        read_sentences(write(tmp_path, ""))
    with pytest.raises(RequestError, match=r"two sentences for 'a\.png' \(row 3\)"):
        read_sentences(write(tmp_path, "image,text\na.png,One\na.png,Two\n"))
    with pytest.raises(RequestError, match="does not exist"):
        read_sentences(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("image,text\na.png,für\n".encode("latin-1"))
    with pytest.raises(RequestError, match="UTF-8"):
        read_sentences(tmp_path / "latin.csv")


def write_xlsx(path: Path, shared: str, sheet: str) -> Path:
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/sharedStrings.xml", f"<sst {space}>{shared}</sst>")
        archive.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{sheet}</sheetData></worksheet>")
    return path


def test_a_spreadsheet_is_read(tmp_path: Path):
    shared = "<si><t>Image</t></si><si><t>Description</t></si><si><r><t>Bilateral </t></r><r><t>infection</t></r></si>"
    rows = '<row><c r="A1" t="s"><v>0</v></c><c r="C1" t="s"><v>1</v></c></row>'
    rows += '<row><c r="A2" t="inlineStr"><is><t>mask_x.png</t></is></c><c r="C2" t="s"><v>2</v></c></row>'
    assert read_sentences(write_xlsx(tmp_path / "t.xlsx", shared, rows)) == {"mask_x.png": "Bilateral infection"}


def test_a_damaged_or_hostile_spreadsheet_is_refused(tmp_path: Path):
    (tmp_path / "bad.xlsx").write_bytes(b"PK nothing")
    with pytest.raises(RequestError, match="cannot be read as XLSX"):
        read_sentences(tmp_path / "bad.xlsx")
    bomb = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(bomb, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", '<!DOCTYPE x [<!ENTITY a "aaa">]><worksheet/>')
    with pytest.raises(RequestError, match="defines entities"):
        read_sentences(bomb)


def test_a_sentence_is_found_by_name_with_or_without_suffix():
    sentences = {"a.png": "One", "b": "Two", "c.jpg": "Three"}
    assert [find_sentence(sentences, n) for n in ("a.png", "b.png", "c.png", "d.png")] == ["One", "Two", "Three", None]


def test_a_sentence_is_found_if_the_name_differs_by_case_only():
    assert find_sentence({"IMG_1.PNG": "One"}, "img_1.png") == "One"
    assert find_sentence({"IMG_1.PNG": "One", "img_1.png": "Two"}, "img_1.png") == "Two"
    assert find_sentence({"Img_1.png": "One", "IMG_1": "One"}, "img_1.tif") == "One"
    with pytest.raises(RequestError, match=r"'Img_1\.png', 'IMG_1' for the picture 'img_1\.tif'"):
        find_sentence({"Img_1.png": "One", "IMG_1": "Two"}, "img_1.tif")


def test_a_mirrored_sentence_says_the_same_of_the_mirrored_picture():
    text = "Dense in the upper left, sparse at the BOTTOM; nothing is left out above."
    assert mirror_sentence(text, horizontal=True).startswith("Dense in the upper right")
    assert (
        mirror_sentence(text, vertical=True) == "Dense in the lower left, sparse at the TOP; nothing is left out below."
    )
    for h in (False, True):
        for v in (False, True):
            assert mirror_sentence(mirror_sentence(text, h, v), h, v) == text
    assert mirror_sentence("Cleft and supper.", True, True) == "Cleft and supper."
