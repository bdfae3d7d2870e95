"""Exports give the same logits, here and in the programs they are for, or leave nothing."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mamba3_train.checkpoint.exports import export_hugging_face, export_official, export_safetensors, new_folder
from mamba3_train.checkpoint.pretrained import open_pretrained
from mamba3_train.errors import UserError
from mamba3_train.evaluation.decoding import Decoder
from mamba3_train.evaluation.generation import generate
from mamba3_train.evaluation.sampling import Sampling
from mamba3_train.model import MixerConfig
from mamba3_train.model.initialization import keeps_float32
from mamba3_train.trained_model import open_trained_model
from tests.small_run import make_config, make_model, tokenizer, write_run

IDS = torch.randint(0, 270, (2, 90), generator=torch.Generator().manual_seed(0))
PROMPTS = ["the state of a", "key", "every token grows with"]
ALL_AT_ONCE = 1 << 40
STACKS = {
    "siso": make_config("M", rank=1),
    "mimo": make_config("M", rank=4, tie_embeddings=False),
    "hybrid": make_config("MM*", n_layers=3, mixer=MixerConfig(d_state=8, head_dim=8, rank=2, output_norm=True)),
    "ablated": make_config(
        mixer=MixerConfig(d_state=8, head_dim=8, trapezoid=False, rotation="data_independent", B_bias=False)
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _code_is_copied_elsewhere(tmp_path_factory):
    """transformers copies a folder's code to the user's cache before it imports it."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module", params=STACKS)
def trained(request, tmp_path_factory):
    """A run of each kind: its folder and its model."""
    model = make_model(STACKS[request.param])
    return write_run(tmp_path_factory.mktemp("runs") / request.param, model), model


def export_to(folder, run, dtype=torch.float32, shard_bytes=ALL_AT_ONCE):
    coder = tokenizer()
    folder.mkdir(exist_ok=True)
    export_hugging_face(open_pretrained(run), folder, coder.documents(), coder.end_of_document_id, dtype, shard_bytes)
    return folder


@pytest.fixture(scope="module")
def loaded(trained, tmp_path_factory):
    """The export as transformers loads it, our model, and the folder."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder = export_to(tmp_path_factory.mktemp("exports") / "hf", trained[0])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), trained[1], folder


def test_transformers_gives_our_logits(loaded):
    theirs, ours, _ = loaded
    assert not theirs.training
    with torch.no_grad():
        expected = ours(IDS)[..., :270]
        output = theirs(IDS, labels=IDS)
        assert (output.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        kept = theirs(IDS, logits_to_keep=3).logits
    assert torch.equal(kept, output.logits[:, -3:])
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert output.loss == pytest.approx(loss.item(), rel=1e-5)


def test_transformers_generates_what_we_generate(loaded):
    """Greedily, prompts of several lengths padded on the left, with its cache and without, from its own tokenizer."""
    from transformers import AutoTokenizer

    theirs, ours, folder = loaded
    coder = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = coder(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert batch.input_ids[1, 0] == tokenizer().end_of_document_id, "padded on the left"
    # Before the end of a document the padding token never comes, so that the penalty finds it too changes nothing.
    expected = generate(ours, tokenizer(), PROMPTS, 8, sampling=Sampling(temperature=0, repetition_penalty=1.3))
    options = {"do_sample": False, "repetition_penalty": 1.3, "max_new_tokens": 8}
    rows = theirs.generate(**batch, **options)[:, batch.input_ids.shape[1] :]
    without_cache = theirs.generate(**batch, use_cache=False, **options)[:, batch.input_ids.shape[1] :]
    assert torch.equal(rows, without_cache)
    for row, continuation in zip(rows, expected.continuations, strict=True):
        assert row[: len(continuation.tokens)].tolist() == continuation.tokens


def test_beams_take_their_states_along(loaded):
    theirs, _, _ = loaded
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 8, "attention_mask": torch.ones(2, 9)}
    cached = theirs.generate(IDS[:, :9], **options)
    assert torch.equal(cached, theirs.generate(IDS[:, :9], use_cache=False, **options))


def test_a_conversation_goes_on_from_its_cache(loaded):
    """Several tokens after a cache, rows padded differently before it."""
    theirs, ours, _ = loaded
    theirs = theirs.double()
    mask = torch.ones(2, 90)
    mask[0, :20] = 0
    with torch.no_grad():
        first = theirs(IDS[:, :50], attention_mask=mask[:, :50], use_cache=True)
        second = theirs(IDS[:, 50:], attention_mask=mask, past_key_values=first.past_key_values)
        logits = torch.cat([first.logits, second.logits], dim=1)
        model = ours.double()
        assert second.past_key_values.get_seq_length() == 90
        assert torch.allclose(logits[1:], model(IDS[1:])[..., :270], rtol=1e-9, atol=1e-9)
        assert torch.allclose(logits[:1, 20:], model(IDS[:1, 20:])[..., :270], rtol=1e-9, atol=1e-9)
    theirs.float()
    ours.float()


def test_the_shipped_code_needs_torch_and_transformers_alone(loaded):
    _, _, folder = loaded
    files = sorted(folder.glob("*.py"))
    assert [file.name for file in files] == ["mamba3_scan.py", "modeling_mamba3.py"]
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    imports = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from ")) and " " in line}
    assert imports - {""} == {"torch", "transformers", "math", "types", "typing"}


def test_exports_come_back(trained, tmp_path):
    """As they are, from several files, and through transformers."""
    run, ours = trained
    expected = ours(IDS)
    export_to(tmp_path / "hf", run)
    (tmp_path / "plain").mkdir()
    export_safetensors(open_pretrained(run), tmp_path / "plain", {}, torch.float32, ALL_AT_ONCE)
    for name in ("hf", "plain"):
        assert torch.equal(open_pretrained(tmp_path / name).build()(IDS), expected)
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == ours.state_dict().keys()
    assert open_trained_model(tmp_path / "hf", device="cpu").tokenizer.fingerprint == tokenizer().fingerprint


def test_large_weights_are_several_files(trained, tmp_path):
    run, ours = trained
    most = 8000
    folder = export_to(tmp_path / "hf", run, shard_bytes=most)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    total = 0
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        total += sum(sizes)
        assert sum(sizes) <= most or len(sizes) == 1
    assert total == index["metadata"]["total_size"]
    assert torch.equal(open_pretrained(folder).build()(IDS), ours(IDS))
    files[1].unlink()
    with pytest.raises(UserError, match=f"{files[1].name} is missing"):
        open_pretrained(folder)


def test_weights_in_bfloat16_keep_the_dynamics(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    run, _ = trained
    folder = export_to(tmp_path / "hf", run, torch.bfloat16)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            assert file.get_tensor(name).dtype == (torch.float32 if keeps_float32(name) else torch.bfloat16), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for name, parameter in theirs.named_parameters():
        assert parameter.dtype == (torch.float32 if keeps_float32(name) else torch.bfloat16), name
    half = open_trained_model(run, device="cpu", dtype="bfloat16").model
    with torch.no_grad():
        error = (theirs(IDS).logits - half(IDS)[..., :270]).abs().max()
    assert error < 0.02 * half(IDS).abs().max(), "the same products, rounded at other places"


@pytest.mark.parametrize("rank", [1, 4])
def test_the_public_layout_comes_back(rank, tmp_path):
    """Its MLPs have a width that the public code builds: 24 here, 128 there."""
    ours = make_model(make_config(rank=rank))
    (tmp_path / "public").mkdir()
    export_official(open_pretrained(write_run(tmp_path / "run", ours)), tmp_path / "public", tokenizer().documents())
    config = json.loads((tmp_path / "public" / "config.json").read_text())
    assert config["d_intermediate"] == 128
    back = open_trained_model(tmp_path / "public", device="cpu")
    assert back.model.layers[0].mlp.fc1.weight.shape == (256, 16)
    assert torch.allclose(back.model(IDS), ours(IDS), rtol=1e-6, atol=1e-5)
    assert back.tokenizer.end_of_document_id == tokenizer().end_of_document_id


def test_generation_goes_on_from_an_export_as_from_the_run(trained, tmp_path):
    run, ours = trained
    export_to(tmp_path / "hf", run)
    decoders = [Decoder(model, [[1, 2, 3], [4]], 3) for model in (ours, open_pretrained(tmp_path / "hf").build())]
    for token in range(3):
        assert torch.equal(decoders[0].logits, decoders[1].logits)
        for decoder in decoders:
            decoder.step(torch.tensor([token, token]))


def test_a_folder_is_whole_or_not_there(tmp_path):
    output = tmp_path / "out"

    def fail():
        with new_folder(output) as folder:
            (folder / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
    with new_folder(output) as folder:
        (folder / "whole").write_text("")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["whole"]
    with pytest.raises(UserError, match="is there already and not empty"), new_folder(output):
        pass
    assert [path.name for path in Path(tmp_path).rglob("*")] == ["out", "whole"]
