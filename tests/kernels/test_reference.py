"""The chunked form is the recurrence, documents do not see each other, states hand over, gradients are right."""

import pytest
import torch

from mamba3_train.kernels import document_ids_from_lengths, mamba3_scan
from tests.scan_inputs import cut, random_documents, scan_inputs, scan_state


def assert_close(actual, expected, tolerance=1e-10):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * (1 + e.abs().max())


def flat(result):
    y, state = result
    return [y, *state]


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 500])
def test_chunked_equals_recurrent(rank, seqlen):
    inputs = scan_inputs(seqlen=seqlen, rank=rank)
    state, documents = scan_state(inputs), random_documents(2, seqlen)
    for ids in (None, documents):
        options = {"document_ids": ids, "initial_state": state, "return_state": True}
        expected = flat(mamba3_scan(**inputs, **options, backend="recurrent"))
        for chunk_size in (1, 7, 16, 64, 512):
            assert_close(flat(mamba3_scan(**inputs, **options, chunk_size=chunk_size)), expected)


@pytest.mark.parametrize("missing", ["trap", "angles", "B_bias", "C_bias", "D", "z", "norm_weight"])
def test_every_option_can_be_left_out(missing):
    inputs = scan_inputs(rank=1)
    full = mamba3_scan(**inputs)
    inputs[missing] = None
    without = mamba3_scan(**inputs, chunk_size=8)
    assert_close([without], [mamba3_scan(**inputs, backend="recurrent")])
    assert not torch.allclose(without, full)


@pytest.mark.parametrize("backend", ["reference", "recurrent"])
def test_fixed_angles_turn_the_same_at_every_token(backend):
    inputs = scan_inputs(rank=1)
    inputs["angles"] = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    y = mamba3_scan(**inputs, backend=backend)
    # The data-dependent form with dt = 1 and the same radians: only dt differs, so compare at dt = 1.
    inputs["dt"] = torch.ones_like(inputs["dt"])
    fixed = mamba3_scan(**inputs, backend=backend)
    logits = torch.atanh(inputs["angles"] / torch.pi).expand(2, 40, 4)
    assert_close([fixed], [mamba3_scan(**inputs | {"angles": logits}, backend=backend)])
    assert not torch.allclose(y, fixed)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("middle", [1, 16, 23, 39])
def test_two_passes_with_the_state_handed_over_equal_one(rank, middle):
    inputs, documents = scan_inputs(rank=rank), random_documents(2, 40)
    whole = flat(mamba3_scan(**inputs, document_ids=documents, return_state=True, chunk_size=16))
    first, state = mamba3_scan(
        **cut(inputs, 0, middle), document_ids=documents[:, :middle], return_state=True, chunk_size=16
    )
    # A document that begins exactly at the cut must not see the state: drop it where the ids change.
    goes_on = (documents[:, middle] == documents[:, middle - 1]).double()
    state = type(state)(*(t * goes_on.view(-1, *[1] * (t.dim() - 1)) for t in state))
    second, last = mamba3_scan(
        **cut(inputs, middle, 40),
        document_ids=documents[:, middle:],
        initial_state=state,
        return_state=True,
        chunk_size=16,
    )
    assert_close([torch.cat([first, second], 1), *last], whole)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("boundary", [1, 15, 16, 17, 31, 39])
def test_no_bit_of_a_document_depends_on_the_one_before(rank, boundary):
    inputs = scan_inputs(rank=rank, dtype=torch.float32)
    documents = (torch.arange(40) >= boundary).long().expand(2, 40)
    dy = torch.randn_like(inputs["x"])
    dy[:, :boundary] = 0

    def run(content):
        tensors = {name: t.clone().requires_grad_() for name, t in content.items()}
        y = mamba3_scan(**tensors, document_ids=documents, chunk_size=16)
        y.backward(dy)
        per_token = cut({name: t.grad for name, t in tensors.items()}, boundary, 40)
        return y[:, boundary:].detach(), y[:, :boundary].detach(), per_token

    other = {name: t.clone() for name, t in inputs.items()}
    for name, t in scan_inputs(rank=rank, dtype=torch.float32).items():
        if name in cut({"x": t}, 0, 1) or (t.dim() > 2 and t.shape[1] == 40):
            other[name][:, :boundary] = 3 * t[:, :boundary]
    y, before, gradients = run(inputs)
    y_other, before_other, gradients_other = run(other)
    assert not torch.equal(before, before_other), "the first document was meant to change"
    assert torch.equal(y, y_other)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_other[name]), name
        # Decay and angle of a one-token document touch nothing.
        assert gradient.abs().sum() > 0 or boundary == 39, name


@pytest.mark.parametrize("rank", [1, 2])
def test_gradients(rank):
    inputs = scan_inputs(batch=1, seqlen=11, heads=2, head_dim=2, d_state=5, rank=rank, groups=1, pairs=1)
    state, documents = scan_state(inputs), torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3]])
    names = list(inputs)

    def run(*tensors):
        values = dict(zip(names, tensors, strict=False))
        initial = type(state)(*tensors[len(names) :])
        return flat(
            mamba3_scan(**values, document_ids=documents, initial_state=initial, return_state=True, chunk_size=4)
        )

    tensors = [t.requires_grad_() for t in (*inputs.values(), *state)]
    assert torch.autograd.gradcheck(run, tensors)


def test_lengths_become_ids():
    ids = document_ids_from_lengths(torch.tensor([0, 3, 5, 8, 8, 8, 10]), 2, 5)
    assert ids.tolist() == [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]
    inputs = scan_inputs(seqlen=5)
    by_lengths = mamba3_scan(**inputs, cu_seqlens=torch.tensor([0, 3, 5, 8, 10]))
    assert torch.equal(by_lengths, mamba3_scan(**inputs, document_ids=ids))


@pytest.mark.parametrize(
    ("lengths", "complaint"),
    [
        ([0, 5, 3, 10], "must not decrease"),
        ([0, 5, 9], "from 0 to batch · seqlen = 10"),
        ([1, 5, 10], "from 0 to batch · seqlen = 10"),
        ([0, 4, 10], "row.s. .1."),
        ([0.0, 10.0], "integers"),
    ],
)
def test_bad_lengths_are_refused(lengths, complaint):
    with pytest.raises(ValueError, match=complaint):
        mamba3_scan(**scan_inputs(seqlen=5), cu_seqlens=torch.tensor(lengths))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda i: i.update(x=i["x"][0]), "x must be"),
        (lambda i: i.update(dt=i["dt"][:, :-1]), r"dt must be \(2, 40, 4\)"),
        (lambda i: i.update(B_bias=i["B_bias"][:, :1]), "B_bias must be"),
        (lambda i: i.update(angles=torch.zeros(2, 40, 9)), "rotate 9 pairs"),
        (lambda i: i.update(mimo_o=None), "rank 2 needs"),
        (lambda i: i.update(z=i["z"].long()), "z must be floating point"),
        (lambda i: i.update(D=i["D"].to("meta")), "D is on meta"),
        (lambda i: i.update(B=i["B"].repeat(1, 1, 1, 2, 1)[:, :, :, :3]), "3 groups"),
        (lambda i: i.update(backend="cuda"), "backend must be one of"),
        (lambda i: i.update(chunk_size=0), "chunk_size"),
        (lambda i: i.update(document_ids=torch.zeros(2, 39, dtype=torch.long)), "document_ids must be"),
        (lambda i: i.update(document_ids=-torch.arange(40).expand(2, 40)), "must not decrease"),
    ],
)
def test_bad_arguments_are_named(change, complaint):
    inputs = scan_inputs()
    change(inputs)
    with pytest.raises(ValueError, match=complaint):
        mamba3_scan(**inputs)


def test_bfloat16_inputs_compute_in_float32():
    inputs = scan_inputs(dtype=torch.float32)
    half = {name: t.bfloat16() if name in ("x", "B", "C", "z") else t for name, t in inputs.items()}
    y = mamba3_scan(**half)
    assert y.dtype == torch.bfloat16
    expected = mamba3_scan(**{name: t.float() for name, t in half.items()})
    assert torch.equal(y, expected.bfloat16())
