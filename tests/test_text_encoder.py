"""Text encoders of the user's folder: umT5 through transformers, and a language model whose hidden states are features."""

from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN

from bitdance.networks.text_encoder import TextEncoder, cleaned, copy_encoder, width_of
from bitdance.sequence.prompt import conditional_ids, unconditional_ids
from lfq_tokenizer.json_file import read_json, write_json

LLM = GOLDEN / "t2i_ckpt"


@pytest.fixture(scope="module")
def umt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with random weights and a text tokenizer that ends a prompt with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("umt5")
    words = ["<pad>", "</s>", "<unk>", "▁a", "▁fox", "▁café", "▁&", "▁two", "▁<T2I>", "<T2I>a"]
    text = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.Metaspace()
    text.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=text, eos_token="</s>", pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=10, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, relative_attention_num_buckets=8)
    UMT5EncoderModel(config).save_pretrained(folder)
    return folder


def test_features_of_umt5_are_those_of_transformers(umt5: Path, tmp_path: Path) -> None:
    from transformers import UMT5EncoderModel

    encoder = TextEncoder.from_pretrained(umt5)
    assert width_of(umt5) == encoder.width == 16 and not any(p.requires_grad for p in encoder.parameters())
    assert encoder.reader.ids("a fox") == [3, 4, 1] and encoder.reader.ids("") == [1] and encoder.reader.ids("  ") == [1]
    reference = UMT5EncoderModel.from_pretrained(umt5)
    ids = torch.tensor([[3, 4, 1], [3, 1, 0]])
    with torch.no_grad():
        padded = reference(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
    found = encoder.encode(["a fox", "a", "a fox"])
    torch.testing.assert_close(found[0], padded[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], padded[1, :2], rtol=0, atol=1e-5)
    assert torch.equal(found[0], found[2])
    copy_encoder(umt5, tmp_path / "copy")
    assert torch.equal(TextEncoder.from_pretrained(tmp_path / "copy").encode(["a fox"])[0], found[0])


def test_prompts_are_repaired_before_they_are_read(umt5: Path) -> None:
    pytest.importorskip("ftfy", reason="prompts for T5 are repaired by ftfy: pip install 'bitdance[umt5]'")
    assert cleaned("  a   cafÃ© &amp;amp; two\n") == "a café & two"
    assert TextEncoder.from_pretrained(umt5).reader.ids("a  cafÃ© &amp;amp; two") == [3, 5, 6, 7, 1]
    assert TextEncoder.from_pretrained(umt5, prefix="<T2I> ", weights=False).reader.ids("a fox") == [8, 3, 4, 1]


def test_features_of_a_language_model_are_its_last_hidden_states() -> None:
    from transformers import AutoModel

    encoder = TextEncoder.from_pretrained(LLM, torch.float32)
    reader = encoder.reader
    assert reader.ids("a fox") == conditional_ids(reader.tokenizer, "a fox") and reader.ids("") == unconditional_ids(
        reader.tokenizer
    )
    (features,) = encoder.encode(["a fox"])
    with torch.no_grad():
        lm = AutoModel.from_pretrained(LLM, dtype=torch.float32)
        expected = lm(input_ids=torch.tensor([reader.ids("a fox")])).last_hidden_state
    torch.testing.assert_close(features, expected[0], rtol=0, atol=1e-5)


def test_a_folder_that_is_no_encoder_is_refused(umt5: Path, tmp_path: Path) -> None:
    copy_encoder(umt5, tmp_path / "m")
    config = read_json(tmp_path / "m" / "config.json")
    for change, said in (
        ({"model_type": "bert"}, "bert"),
        ({"auto_map": {"AutoModel": "x.py"}}, "asks to run code"),
        ({"d_ff": 25}, "has shape|expected"),
        ({"num_layers": 0}, "num_layers = 0"),
    ):
        write_json({**config, **change}, tmp_path / "m" / "config.json")
        with pytest.raises(ValueError, match=said):
            TextEncoder.from_pretrained(tmp_path / "m")
    write_json(config, tmp_path / "m" / "config.json")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        TextEncoder.from_pretrained(tmp_path / "m")
