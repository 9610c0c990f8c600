"""The classic feature methods against the official implementations, and by their definitions."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from cakd_cli.losses import Lesson, Shapes
from cakd_cli.losses.features import singular_values
from cakd_cli.losses.features.activation_boundaries import ABTerm, activation_boundaries
from cakd_cli.losses.features.attention import ATTerm, at
from cakd_cli.losses.features.correlation_congruence import CCTerm, cc
from cakd_cli.losses.features.factor_transfer import Paraphraser, Translator, ft
from cakd_cli.losses.features.layers import VectorsTerm
from cakd_cli.losses.features.neuron_selectivity import NSTTerm, nst
from cakd_cli.losses.features.pairs import unit
from cakd_cli.losses.features.relational import RKDTerm, rkd
from cakd_cli.losses.features.similarity import PKTTerm, SPTerm, pkt, sp
from cakd_cli.losses.features.singular_values import KDSVDTerm, kdsvd
from cakd_cli.losses.features.solution_flow import FSPTerm, fsp
from cakd_cli.losses.features.variational import VIDTerm, vid
from tests.losses import reference
from tests.losses.reference import FEATURES

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
# Methods that sum a function of two maps over the stages.
PAIRWISE = {"AT": (ATTerm, at), "SP": (SPTerm, sp), "NST": (NSTTerm, nst)}
VECTORS = {"RKD": (RKDTerm, rkd), "PKT": (PKTTerm, pkt)}
OTHERS = ("CC", "VID", "FT", "FSP", "AB", "KDSVD")
TERMS = (ATTerm, SPTerm, NSTTerm, CCTerm, RKDTerm, PKTTerm, VIDTerm, FSPTerm, ABTerm, KDSVDTerm)
# The matrix of a sample, by whose code it is.
VARIANTS = {"RepDistiller": "channels", "mdistiller": "columns"}


def load(name, dtype):
    """The case, and the layers of both networks; the student's want a gradient."""
    case = FEATURES.case(name)
    names = [case["inputs"][role] for role in ("student", "teacher")]
    students, teachers = (
        [FEATURES.tensor(one, dtype) for one in ([given] if isinstance(given, str) else given)] for given in names
    )
    return case, [student.requires_grad_() for student in students], teachers


def layered(term, count):
    """The term on so many pairs of layers, and where it looks."""
    if isinstance(term, VectorsTerm):
        return term
    return term.model_copy(
        update={"layers": type(term)(layers=[{"student": f"s{i}", "teacher": f"t{i}"} for i in range(count)]).layers}
    )


def made(term, students, teachers):
    needs = term.needs
    shapes = (
        {look: tuple(layer.shape[1:]) for look, layer in zip(looks, layers, strict=True)}
        for looks, layers in ((needs.student_layers, students), (needs.teacher_layers, teachers))
    )
    return term.module(Shapes(*shapes))


def loss_of(term, students, teachers, module=None):
    needs = term.needs
    nothing = students[0].new_zeros(len(students[0]), 2)
    layers = (
        dict(zip(needs.student_layers, students, strict=True)),
        dict(zip(needs.teacher_layers, teachers, strict=True)),
    )
    return term(Lesson(nothing, nothing, nothing[:, 0].long(), *layers), module)


def fill(case, module, dtype, rename=lambda key: key, prefix=""):
    """Give a module the connector's weights of a case."""
    weights = {key.removeprefix(prefix): name for key, name in case["weights"].items() if key.startswith(prefix)}
    state = {rename(key): FEATURES.tensor(name, dtype) for key, name in weights.items()}
    module.to(dtype).load_state_dict(state)


def near(given, expected, relative):
    values = torch.as_tensor(expected, dtype=torch.float64)
    given = torch.stack(list(given)) if isinstance(given, list) else given
    assert ((given.double() - values).abs() <= relative * values.abs().clamp(min=1e-3)).all(), (given, expected)


def assert_matches(case, total, students, relative):
    near(total, case["total"], relative)
    names = case["inputs"]["student"]
    for name, student in zip([names] if isinstance(names, str) else names, students, strict=True):
        FEATURES.assert_gradient(case["grads"][name], total, student, relative)


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


# The official implementations.


@DTYPES
@pytest.mark.parametrize("name", FEATURES.cases(*PAIRWISE))
def test_sum_over_stages(name, dtype):
    case, students, teachers = load(name, dtype)
    kind, function = PAIRWISE[case["method"]]

    per_stage = [function(*pair, **case["params"]).total for pair in zip(students, teachers, strict=True)]
    loss = loss_of(layered(kind(**case["params"]), len(students)), students, teachers)

    relative = reference.tolerance(dtype)
    expected = case["components"]["per_stage"]
    near(per_stage, expected if isinstance(expected, list) else [expected], relative)
    assert_matches(case, loss.total, students, relative)


@DTYPES
@pytest.mark.parametrize("name", FEATURES.cases(*VECTORS))
def test_vectors(name, dtype):
    case, students, teachers = load(name, dtype)
    kind, function = VECTORS[case["method"]]
    relative = reference.tolerance(dtype)

    loss = function(*students, *teachers, **case["params"])
    settings = {key: value for key, value in case["params"].items() if key != "eps"}

    FEATURES.assert_values(case, loss.total, loss.parts, relative)
    assert_matches(case, loss_of(kind(**settings), students, teachers).total, students, relative)


@DTYPES
@pytest.mark.parametrize("name", FEATURES.cases("CC"))
def test_cc(name, dtype):
    case, students, teachers = load(name, dtype)
    if "weights" in case:
        term = CCTerm(**case["params"])
        module = made(term, students, teachers)
        names = {"embed_s": "student", "embed_t": "teacher"}
        fill(case, module, dtype, lambda key: f"{names[key.split('.')[0]]}.{key.split('.')[-1]}")
        loss = loss_of(term, students, teachers, module)
    else:
        loss = cc(*students, *teachers)

    FEATURES.assert_values(case, loss.total, loss.parts, reference.tolerance(dtype))
    assert_matches(case, loss.total, students, reference.tolerance(dtype))


@DTYPES
@pytest.mark.parametrize("name", FEATURES.cases("VID"))
def test_vid(name, dtype):
    case, students, teachers = load(name, dtype)
    term = layered(VIDTerm(**case["params"]), 1)
    module = made(term, students, teachers)
    fill(case, module.regressors[0], dtype)

    loss = loss_of(term, students, teachers, module)

    FEATURES.assert_values(case, loss.total, loss.parts, reference.tolerance(dtype))
    assert_matches(case, loss.total, students, reference.tolerance(dtype))
    scale = module.regressors[0].log_scale
    FEATURES.assert_gradient(case["tensors"]["grad_log_scale"], loss.total, scale, reference.tolerance(dtype))


@DTYPES
@pytest.mark.parametrize("name", FEATURES.cases("FT"))
def test_ft(name, dtype):
    case, (student,), (teacher,) = load(name, dtype)
    parts, powers = {}, {key: case["params"][key] for key in ("p1", "p2")}
    mine, theirs = student, teacher
    if "weights" in case:
        rate = case["params"]["factor_rate"]
        translator = Translator(student.shape[1], teacher.shape[1], rate)
        paraphraser = Paraphraser(teacher.shape[1], rate)
        fill(case, translator, dtype, prefix="translator.")
        fill(case, paraphraser, dtype, prefix="paraphraser.")
        mine, theirs = translator(student), paraphraser(teacher)
        parts["paraphraser_reconstruction_mse"] = paraphraser.reconstruction(teacher)

    loss = ft(mine, theirs, **powers)

    FEATURES.assert_values(case, loss.total, loss.parts | parts, reference.tolerance(dtype))
    assert_matches(case, loss.total, [student], reference.tolerance(dtype))


@DTYPES
@pytest.mark.parametrize("name", FEATURES.cases("FSP"))
def test_fsp(name, dtype):
    case, students, teachers = load(name, dtype)

    pairs = zip(pairwise(students), pairwise(teachers), strict=True)
    per_pair = [fsp(mine, theirs).total for mine, theirs in pairs]
    loss = loss_of(layered(FSPTerm(), len(students)), students, teachers)

    near(per_pair, case["components"]["per_pair"], reference.tolerance(dtype))
    assert_matches(case, loss.total, students, reference.tolerance(dtype))


@DTYPES
@pytest.mark.parametrize("name", FEATURES.cases("AB"))
def test_activation_boundaries(name, dtype):
    case, students, teachers = load(name, dtype)
    margin = case["params"]["margin"]
    term = layered(ABTerm(margin=margin), len(students))
    module = made(term, students, teachers)
    assert bool(list(module.parameters())) == case["params"]["connector"]
    if "weights" in case:
        fill(case, module, dtype)

    loss = loss_of(term, students, teachers, module)

    connected = [connector(student) for connector, student in zip(module.connectors, students, strict=True)]
    per_stage = [
        activation_boundaries([mine], [theirs], margin=margin).total * 2.0 ** (i - len(students) + 1)
        for i, (mine, theirs) in enumerate(zip(connected, teachers, strict=True))
    ]
    near(per_stage, case["components"]["per_stage_weighted"], reference.tolerance(dtype))
    assert_matches(case, loss.total, students, reference.tolerance(dtype))


@DTYPES
@pytest.mark.parametrize("name", FEATURES.cases("KDSVD"))
def test_kdsvd(name, dtype, monkeypatch):
    case, students, teachers = load(name, dtype)
    # The value depends on the signs of singular vectors, which are the library's of the machine that ran the code.
    stored = iter([FEATURES.tensor(case["tensors"][f"v_teacher_{i}"], dtype) for i in range(len(teachers))])
    monkeypatch.setattr(
        singular_values,
        "_oriented",
        lambda vectors_BNK: vectors_BNK * (vectors_BNK * next(stored)).sum(1, keepdim=True).sign(),
    )
    variant = VARIANTS[case["params"]["variant"].split()[0]]
    term = layered(KDSVDTerm(k=case["params"]["k"], variant=variant), len(students))

    loss = loss_of(term, students, teachers, made(term, students, teachers))

    # Singular vectors of close values have three digits less in float32, in which mdistiller computes them.
    exact = dtype == torch.float64 and case["dtype"] == "float64"
    FEATURES.assert_values(case, loss.total, loss.parts, 1e-9 if exact else 1e-4)
    assert_matches(case, loss.total, students, 1e-9 if exact else 1e-4)


def test_no_case_is_left_out():
    tested = [name for names in (PAIRWISE, VECTORS, OTHERS) for name in FEATURES.cases(*names)]
    elsewhere = {"FitNet", "CRD", "OFD", "ReviewKD"}

    assert len(tested) == 23
    methods = {case["method"] for case in FEATURES.content["cases"].values()}
    assert methods == {*PAIRWISE, *VECTORS, *OTHERS} | elsewhere


# Definitions.


def test_nst_by_loops():
    student, teacher = (map_BDHW.abs() for map_BDHW in draw((2, 3, 2, 2), (2, 4, 2, 2)))

    def kernel(a, b):
        return sum((x @ y) ** 2 for i in range(2) for x in rows(a[i]) for y in rows(b[i])) / (2 * len(a[0]) * len(b[0]))

    def rows(maps):
        return [x.flatten() / x.norm() for x in maps]

    expected = kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)
    assert_close(nst(student, teacher).total, expected)


def test_rkd_by_loops():
    student, teacher = draw((4, 3), (4, 5))

    def distances(x):
        found = [[(a - b).norm() for b in x] for a in x]
        mean = sum(map(sum, found)) / 12
        return [value / mean for row in found for value in row]

    def cosines(x):
        def direction(difference):
            return difference / difference.norm().clamp(min=1e-12)

        return [direction(b - a) @ direction(c - a) for a in x for b in x for c in x]

    def huber(a, b):
        return 0.5 * (a - b) ** 2 if (a - b).abs() < 1 else (a - b).abs() - 0.5

    loss = rkd(student, teacher, distance_weight=2, angle_weight=3)

    for part, relation in (("distance", distances), ("angle", cosines)):
        mine, theirs = relation(student), relation(teacher)
        assert_close(loss.parts[part], sum(map(huber, mine, theirs)) / len(mine))
    assert_close(loss.total, 2 * loss.parts["distance"] + 3 * loss.parts["angle"])


def test_activation_boundaries_by_loops():
    students, teachers = draw((2, 3, 2, 2), (2, 5, 1, 1)), draw((2, 3, 2, 2), (2, 5, 1, 1), seed=1)

    expected = 0.0
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
            missed = (s - 0.5) ** 2 * (s <= 0.5) if t > 0 else (s + 0.5) ** 2 * (s > -0.5)
            expected += 2 ** (i - 1) * 3 / 1000 * missed / 2

    assert activation_boundaries(students, teachers, margin=0.5).total.item() == pytest.approx(expected)


def test_kdsvd_has_the_gradient_of_the_decomposition():
    (matrix,) = draw((2, 6, 4))
    matrix.requires_grad_()
    (weights,) = draw((2, 4, 3), seed=1)
    for given in (matrix, matrix.mT):
        _, _, vectors = torch.linalg.svd(given, full_matrices=False)
        vectors = vectors[:, :3].mT
        cotangent = torch.cat([weights, weights[:, :2]], dim=1)[:, : given.shape[2]]

        _, found = singular_values._decomposed(given, 3)

        assert_close(found, vectors)
        ours, theirs = (torch.autograd.grad((x * cotangent).sum(), matrix)[0] for x in (found, vectors))
        assert_close(ours, theirs)


@pytest.mark.parametrize("variant", ["channels", "columns"])
def test_kdsvd_stands_channels_that_are_zero(variant):
    students, teachers = draw((2, 6, 3, 3), (2, 6, 3, 3)), draw((2, 6, 3, 3), (2, 6, 3, 3), seed=1)
    students = [(student * (torch.arange(6) < 2).view(-1, 1, 1)).requires_grad_() for student in students]
    teachers[1][0] = 0

    total = kdsvd(students, teachers, k=2, variant=variant).total
    gradients = torch.autograd.grad(total, students)

    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].abs().sum() > 0


def test_kdsvd_does_not_depend_on_signs():
    students, teachers = draw((2, 3, 3, 3), (2, 4, 3, 3)), draw((2, 3, 3, 3), (2, 4, 3, 3), seed=1)

    expected = kdsvd(students, teachers).total

    assert_close(kdsvd([-students[0], students[1]], teachers).total, expected)
    assert_close(kdsvd(students, [teachers[0], -teachers[1]]).total, expected)


# name: loss of the student's layers and the teacher's, and shapes of one layer without the batch.
CASES = {
    "at": (lambda s, t: at(s[0], t[0], p=2), (3, 4, 4)),
    "sp": (lambda s, t: sp(s[0], t[0]), (3, 4, 4)),
    "nst": (lambda s, t: nst(s[0], t[0]), (3, 4, 4)),
    "rkd": (lambda s, t: rkd(s[0], t[0], distance_weight=1, angle_weight=1), (5,)),
    "pkt": (lambda s, t: pkt(s[0], t[0]), (5,)),
    "kdsvd": (kdsvd, (3, 4, 4)),
    "cc": (lambda s, t: cc(s[0], t[0].detach()), (5,)),
    "vid": (lambda s, t: vid(s[0], t[0], t[0].new_zeros(3)), (3, 4, 4)),
    "ft": (lambda s, t: ft(s[0], t[0], p1=2, p2=1), (3, 4, 4)),
    "fsp": (fsp, (3, 4, 4)),
    "ab": (lambda s, t: activation_boundaries(s, t, margin=1), (3, 4, 4)),
}
# Those whose parts know no scale, and can stand any.
SCALE_FREE = ("at", "sp", "nst", "rkd", "pkt", "kdsvd", "ft")


def given(name, batch=4, dtype=torch.float64):
    loss, shape = CASES[name]
    students, teachers = (
        [x.to(dtype).requires_grad_() for x in draw(*[(batch, *shape)] * 2, seed=seed)] for seed in (0, 1)
    )
    return loss, students, teachers


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_the_student_and_not_the_teacher(name):
    loss, students, teachers = given(name)

    loss(students, teachers).total.backward()

    assert students[0].grad.abs().sum() > 0
    assert all(teacher.grad is None for teacher in teachers)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("vid", "ab")])
def test_nothing_is_lost_between_equals(name):
    loss, students, _ = given(name)

    assert_close(loss(students, students).total, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e18, 1e30])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_finite_at_any_scale(name, scale):
    loss, students, teachers = given(name, dtype=torch.float32)
    scaled = [student * scale for student in students]

    total = loss(scaled, teachers).total
    # What a sample has of the gradient is by its scale; here it is what reaches the unscaled layer.
    total.backward()

    assert total.isfinite()
    assert students[0].grad.isfinite().all()
    if scale > 1:
        assert_close(total, loss(students, teachers).total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*SCALE_FREE, "cc"])
def test_finite_where_samples_are_alike_or_alone(name):
    loss, students, teachers = given(name)
    alike = [student[:1].expand_as(student) for student in students]

    for mine, theirs in ((alike, teachers), ([s[:1] for s in students], [t[:1] for t in teachers])):
        total = loss(mine, theirs).total
        (gradient,) = torch.autograd.grad(total, students[0])
        assert total.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 100


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_in_single(name):
    loss, students, teachers = given(name, dtype=torch.bfloat16)
    singles = [x.float() for x in students], [x.float() for x in teachers]

    with torch.autocast("cpu", torch.bfloat16):
        total = loss(students, teachers).total

    assert total.dtype == torch.float32
    assert_close(total, loss(*singles).total)


@pytest.mark.parametrize("name", [name for name in CASES if name != "kdsvd"])
def test_nothing_reads_a_value(name):
    loss, shape = CASES[name]

    # There are no values to read: what would wait for a device fails here.
    with FakeTensorMode():
        layers = [[torch.empty(4, *shape).requires_grad_() for _ in range(2)] for _ in range(2)]
        loss(*layers).total.backward()


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_finite_is_seen(name):
    loss, students, teachers = given(name)
    with torch.no_grad():
        students[0][1, 0] = torch.nan

    assert loss(students, teachers).total.isnan()


@pytest.mark.parametrize("name", CASES)
def test_batches_that_differ_are_refused(name):
    loss, students, teachers = given(name)

    with pytest.raises(ValueError, match=r"needs two|needs maps|must have one shape"):
        loss(students, [teacher[:3] for teacher in teachers])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v: at(m, m, p=0), "p must be at least 1"),
        (lambda m, v: at(v, v, p=2), r"needs maps \(batch, channels, height, width\)"),
        (lambda m, v: sp(v[:, 0], v), r"needs two tensors \(batch, ...\)"),
        (lambda m, v: rkd(v, m, distance_weight=1, angle_weight=1), "needs two tensors"),
        (lambda m, v: rkd(v, v, distance_weight=1, angle_weight=1, eps=0), "eps must be in"),
        (lambda m, v: pkt(v, v, eps=0), "eps must be positive"),
        (lambda m, v: vid(m, m, v[0, :2]), "as many channels"),
        (lambda m, v: vid(m, m, v[0, :3], eps=0), "eps must be positive"),
        (lambda m, v: ft(m, m, p1=2, p2=0.5), "p2 must be at least 1"),
        (lambda m, v: Translator(4, 1), "has none"),
        (lambda m, v: fsp([m], [m]), "needs two stages"),
        (lambda m, v: fsp([m, m], [m, m[:, :2]]), "as many channels"),
        (lambda m, v: activation_boundaries([m], [m, m], margin=1), "as many stages"),
        (lambda m, v: activation_boundaries([m], [m], margin=-1), "margin must not be negative"),
        (lambda m, v: kdsvd([m, m], [m, m], k=0), "k must be at least 1"),
        (lambda m, v: kdsvd([m, m], [m, m], variant="rows"), "variant must be one of"),
        (lambda m, v: kdsvd([m, m], [m, m[..., :2]]), "one width"),
        (lambda m, v: kdsvd([m, m], [m, m[:, :2]], variant="channels"), "as many channels"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw((4, 3, 4, 4), (4, 5)))


# Terms.


def test_objectives_stand_for_cross_entropy_and_the_usual_weight():
    weights = {entries[1]["type"]: entries[1].get("weight") for kind in TERMS for entries in kind.objectives.values()}

    assert weights == {
        "at": 1000,
        "sp": 3000,
        "nst": 50,
        "cc": 0.02,
        "rkd": None,
        "pkt": 30000,
        "vid": None,
        "fsp": 50,
        "activation-boundaries": None,
        "kdsvd": None,
    }
    for kind in TERMS:
        for name, (supervised, entry) in kind.objectives.items():
            assert supervised == {"type": "cross-entropy"}
            assert kind(**entry).type == name


def test_where_terms_look():
    stages = ["stage1", "stage2", "stage3"]

    assert [pair.student for pair in SPTerm().between(stages, stages).layers] == ["stage3"]
    for kind in (ATTerm, NSTTerm, VIDTerm, FSPTerm, ABTerm, KDSVDTerm):
        assert [pair.student for pair in kind().between(stages, stages).layers] == stages
    assert {look.form for look in ABTerm().between(stages, stages).needs.student_layers} == {"preactivation"}


def test_a_flow_needs_two_stages_of_one_width():
    with pytest.raises(ValidationError, match="two pairs of layers"):
        FSPTerm(layers=[{"student": "a", "teacher": "b"}])
    wide, narrow = draw((2, 4, 2, 2), (2, 3, 2, 2))
    for kind in (FSPTerm, KDSVDTerm):
        with pytest.raises(ValueError, match="two stages"):
            made(layered(kind(), 2).between(["a"], ["b"]).model_copy(update={"layers": ()}), [], [])
    with pytest.raises(ValueError, match="as many channels"):
        made(layered(FSPTerm(), 2), [wide, wide], [wide, narrow])


def test_the_regressor_begins_with_its_variance_and_is_trained_along():
    students, teachers = draw((4, 3, 4, 4)), draw((4, 5, 2, 2), seed=1)
    term = layered(VIDTerm(), 1)
    module = made(term, students, teachers).double()

    total = loss_of(term, students, teachers, module).total
    total.backward()

    (regressor,) = module.regressors
    assert_close(regressor.log_scale.exp().log1p() + 1e-5, torch.full((5,), 5.0).double())
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert total.item() > 0.5 * math.log(5) - 1e-6


def test_both_embeddings_of_cc_are_trained_along():
    students, teachers = draw((4, 3)), draw((4, 6), seed=1)
    teachers[0].requires_grad_()
    term = CCTerm(feat_dim=7)
    module = made(term, students, teachers).double()

    loss_of(term, students, teachers, module).total.backward()

    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert teachers[0].grad is None


def test_unit_has_no_gradient_where_there_is_no_direction():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)

    unit(vectors, 1).sum().backward()

    assert_close(unit(vectors, 1), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert torch.equal(vectors.grad[1], torch.zeros(2))
