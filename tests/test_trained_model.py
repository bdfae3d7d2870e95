"""Opening what was trained: runs, checkpoints, public folders; their tokenizers; and what is broken or foreign."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mamba3_train.checkpoint.official_mamba import load_official
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.errors import UserError
from mamba3_train.model.initialization import keeps_float32
from mamba3_train.trained_model import open_trained_model
from tests.small_run import make_config, make_model, tokenizer, write_run

PUBLIC = Path(__file__).parent / "golden" / "official_lm_siso"


@pytest.fixture(scope="module")
def model():
    return make_model(make_config("M*"))


@pytest.fixture
def run(tmp_path, model):
    return write_run(tmp_path / "run", model, steps=(3, 7))


def test_a_run_opens_with_its_tokenizer_at_its_newest_step(run, model):
    opened = open_trained_model(run, device="cpu")
    ids = torch.randint(0, 270, (2, 20))
    assert torch.equal(opened.model(ids), model(ids))
    assert not opened.model.training
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())
    assert opened.tokenizer.fingerprint == tokenizer().fingerprint
    assert (opened.step, opened.description) == (7, f"{run}, step 7")
    assert opened.run_config.model.d_model == 16
    assert open_trained_model(run, step=3, device="cpu").step == 3
    checkpoint = open_trained_model(run / "checkpoints" / "step-00000003", device="cpu")
    assert (checkpoint.step, checkpoint.tokenizer.vocab_size) == (3, tokenizer().vocab_size)


def test_a_damaged_newest_checkpoint_is_passed_over(run):
    with next((run / "checkpoints" / "step-00000007").glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert open_trained_model(run, device="cpu").step == 3
    with pytest.raises(UserError, match=r"step-00000007 is damaged: shard-.* has changed"):
        open_trained_model(run, step=7, device="cpu")


def test_weights_are_narrowed_but_not_the_dynamics(run, model):
    half = open_trained_model(run, device="cpu", dtype="bfloat16").model
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if keeps_float32(name) else torch.bfloat16), name
    ids = torch.randint(0, 270, (2, 20))
    error = (half(ids) - model(ids)).norm() / model(ids).norm()
    assert 1e-4 < error < 0.02, "bfloat16 rounds to three digits"
    wide = open_trained_model(run, device="cpu", dtype="float64").model
    assert wide(ids).dtype == torch.float64
    assert torch.allclose(wide(ids).float(), model(ids), atol=1e-4)


def test_shards_of_several_ranks_are_put_together(run, model):
    """Every tensor in two pieces, by rows, as two ranks would have written it."""
    from mamba3_train.checkpoint.folders import publish, unfinished
    from mamba3_train.checkpoint.sharded import Piece, write_shard

    source, folder = run / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000009"
    unfinished(folder).mkdir()
    shards = {}
    for rank in (0, 1):
        pieces = []
        for name, tensor in model.state_dict().items():
            cut = tensor.shape[0] // 3
            part, begin = (tensor[:cut], 0) if rank == 0 else (tensor[cut:], cut)
            pieces.append(Piece(f"model.{name}", (begin, *(0,) * (tensor.dim() - 1)), part))
        shards[f"shard-{rank}.safetensors"] = write_shard(unfinished(folder) / f"shard-{rank}.safetensors", pieces)
    publish(folder, shards, {name: (source / name).read_text() for name in ("state.json", "config.yaml")})
    ids = torch.randint(0, 270, (1, 9))
    assert torch.equal(open_trained_model(folder, device="cpu").model(ids), model(ids))


def test_public_checkpoints_open(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer: name one by tokenizer="):
        open_trained_model(PUBLIC, device="cpu")
    opened = open_trained_model(PUBLIC, device="cpu", tokenizer_needed=False)
    ids = torch.randint(0, 200, (1, 30))
    assert opened.tokenizer is None
    assert torch.equal(opened.model(ids), load_official(PUBLIC)(ids))
    tokenizer().save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"the tokenizer has 270 entries, the model of .* 203"):
        open_trained_model(PUBLIC, device="cpu", tokenizer=str(tmp_path))


def test_the_end_of_document_is_the_one_that_was_named(tmp_path):
    named = Tokenizer.train(["some text"], 260, end_of_document="<stop>")
    for name, text in named.documents().items():
        (tmp_path / name).write_text(text)
    assert Tokenizer.from_folder(tmp_path).end_of_document == "<stop>"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["eos_token"] = {"content": "<stop>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_folder(tmp_path).end_of_document == "<stop>"
    assert Tokenizer.from_folder(tmp_path / "elsewhere") is None


def edit_config(change):
    def damage(run):
        for path in (run / "checkpoints").glob("step-*"):
            shutil.rmtree(path)
        write_run(run, make_model(make_config()))
        config = next((run / "checkpoints").glob("step-*")) / "config.yaml"
        config.write_text(change(config.read_text()))
        manifest = config.with_name("manifest.json")
        content = json.loads(manifest.read_text())
        del content["files"]["config.yaml"]
        manifest.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (shutil.rmtree, "does not exist: give the folder of a run"),
        (lambda run: (run / "config.yaml").unlink(), "holds neither a config.yaml nor a config.json"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
        (lambda run: (run / "tokenizer.json").write_text("{"), "not a tokenizer.json"),
        (edit_config(lambda text: text.replace("d_model: 16", "d_model: 32")), "has shape"),
        (edit_config(lambda text: text.replace("n_layers: 2", "n_layers: 1")), r"unexpected \['layers.1"),
        (edit_config(lambda text: text.replace("d_model: 16", "d_modle: 16")), "d_modle, which this version does not"),
        (edit_config(lambda text: text.replace("d_model: 16", "d_model: many")), "config cannot be used"),
        (edit_config(lambda text: text.replace("model:", "modle:", 1)), "no section model"),
        (edit_config(lambda text: "{" + text), "cannot be read"),
    ],
)
def test_broken_runs_get_one_clear_line(run, damage, complaint):
    damage(run)
    with pytest.raises(UserError, match=complaint) as caught:
        open_trained_model(run, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[1]", "holds list, expected an object"),
        ('{"model_type": "llama"}', "is of model_type 'llama': only exports of this package"),
        ('{"ssm_cfg": {"layer": "Mamba3"}}', "holds neither model.safetensors nor"),
        ('{"mamba3": {"vocab_size": 3}}', "config cannot be used: .*d_model"),
    ],
)
def test_foreign_folders_get_one_clear_line(tmp_path, content, complaint):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=complaint) as caught:
        open_trained_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_steps_devices_and_dtypes_that_are_not_there(run):
    for arguments, complaint in (
        ({"step": 5}, r"no checkpoint of step 5; it has those of 3, 7"),
        ({"device": "cuda:77"}, "device=cuda:77 cannot be used here"),
        ({"dtype": "float16"}, "dtype=float16 must be auto or one of float32"),
        ({"tokenizer": "./nothing.json"}, "tokenizer file not found"),
    ):
        with pytest.raises(UserError, match=complaint):
            open_trained_model(run, **{"device": "cpu"} | arguments)
    with pytest.raises(UserError, match="holds one model"):
        open_trained_model(PUBLIC, step=3, device="cpu")


def test_nothing_that_a_config_names_is_called(run):
    """A run folder from elsewhere may name any function as `_target_`."""
    edit_config(lambda text: text.replace("d_state:", "_target_: os.abort\n    d_state:", 1))(run)
    assert open_trained_model(run, device="cpu").model.config.mixer.d_state == 8
