"""Feature methods with connectors and memory banks, against the official implementations and their definitions."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from cakd_cli.losses import CrossEntropyTerm, KDTerm, Lesson, Look, Shapes, Weights
from cakd_cli.losses.features import contrastive
from cakd_cli.losses.features.class_attention import CATKDTerm, cat_kd, class_activation_maps
from cakd_cli.losses.features.contrastive import ContrastiveMemory, CRDTerm, crd
from cakd_cli.losses.features.cross_layer import CrossLayerAttention, SemCKDTerm, layer_attention, sem_ckd
from cakd_cli.losses.features.dense_relational import dist_dense
from cakd_cli.losses.features.many_to_one import ManyToOne, norm, norm_beta1, norm_imagenet, norm_step
from cakd_cli.losses.features.masked_generation import MaskedGeneration, MGDTerm, mgd, mgd_mask
from cakd_cli.losses.features.overhaul import OFDTerm, ofd, ofd_margins
from cakd_cli.losses.features.reused_classifier import sim_kd
from cakd_cli.losses.features.review import ReviewFusion, ReviewKDTerm, review_kd
from cakd_cli.losses.features.softmax_regression import ChannelConnector, SRRLTerm, srrl, srrl_pooled
from cakd_cli.losses.relational import dist
from cakd_cli.models.ends import Projection
from tests.losses import reference

# Whose deepest batch norms see two numbers a channel: their gradients are small differences of large ones.
ILL_CONDITIONED = "ReviewKD/resize"
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
OLDER = {"CRD", "OFD", "ReviewKD"}
NEWER = {
    "SimKD",
    "SemCKD",
    "CAT_KD",
    "SRRL",
    "SRRL_pooled",
    "MGD",
    "NORM",
    "NORM_step",
    "NORM_imagenet",
    "DIST_dense",
}


class Given:
    """A case: its inputs in a type, and what comes out of it held to the reference.

    Args:
        name: Of the case.
        dtype: Of its numbers.
        names: What replaces what in the reference's names of weights, as regular expressions; what is replaced by an
            exclamation mark is no weight of the module.
    """

    def __init__(self, name, dtype, names=None):
        self.vectors = reference.NEWER_FEATURES if name in reference.NEWER_FEATURES.content["cases"] else None
        self.vectors = self.vectors or reference.FEATURES
        self.case = self.vectors.case(name)
        self.params = {key: value for key, value in self.case["params"].items() if key != "bn_training"}
        self.names = names or {}
        self.dtype = dtype
        self.limit = 1e-4 if name == ILL_CONDITIONED and dtype == torch.float32 else reference.tolerance(dtype)
        self.leaves = {}
        for tensor in self.case["grads"]:
            self.leaves[tensor] = self.vectors.tensor(tensor, dtype).requires_grad_()

    def __getitem__(self, role):
        names = self.case["inputs"][role]
        if isinstance(names, list):
            return [self._input(name) for name in names]
        return self._input(names)

    def _input(self, name):
        return self.leaves[name] if name in self.leaves else self.vectors.tensor(name, self.dtype)

    def weight(self, name):
        return self.vectors.tensor(self.case["weights"][name], self.dtype)

    def renamed(self, kind):
        found = {}
        for key, tensor in self.case.get(kind, {}).items():
            name = key
            for pattern, replacement in self.names.items():
                name = re.sub(pattern, replacement, name)
            if "!" not in name:
                found[name] = tensor
        return found

    def load(self, module):
        module.to(self.dtype)
        weights = {name: self.vectors.tensor(tensor, self.dtype) for name, tensor in self.renamed("weights").items()}
        missing, unexpected = module.load_state_dict(weights, strict=False)
        assert not unexpected
        assert all("num_batches_tracked" in name or "normalisers" in name or "_C" in name for name in missing)
        return module

    def holds(self, total, parts, module=None):
        """Hold values and gradients to the reference, and what batch norms have kept."""
        limit = self.limit
        self.vectors.assert_values(self.case, total, parts, limit)
        for tensor, gradient in self.case["grads"].items():
            self.vectors.assert_gradient(gradient, total, self.leaves[tensor], limit)
        if module is None:
            return
        weights, state = dict(module.named_parameters()), module.state_dict()
        for name, gradient in self.renamed("grads_weights").items():
            self.vectors.assert_gradient(gradient, total, weights[name], limit)
        for name, tensor in self.renamed("weights_after").items():
            assert_close(state[name].double(), self.vectors.tensor(tensor), rtol=limit, atol=limit)


def cases(method):
    return pytest.mark.parametrize("name", reference.FEATURES.cases(method) + reference.NEWER_FEATURES.cases(method))


def between(term, students, teachers):
    """The term on as many stages as there are maps of each."""
    counts = (sum(one.ndim == 4 for one in features) for features in (students, teachers))
    return term.between(*([f"stage{i + 1}" for i in range(count)] for count in counts))


def shapes(term, students, teachers, **more):
    looks = zip(term.needs[1:3], (students, teachers), strict=True)
    sizes = ({look: tuple(one.shape[1:]) for look, one in zip(*pair, strict=True)} for pair in looks)
    return Shapes(*sizes, **{"batch_size": len(students[0]), **more})


def lesson(term, students, teachers, **more):
    logits = torch.zeros(len(students[0]), 2, dtype=students[0].dtype)
    looks = zip(term.needs[1:3], (students, teachers), strict=True)
    return Lesson(logits, logits, logits[:, 0].long(), *(dict(zip(*pair, strict=True)) for pair in looks), **more)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_no_vector_is_left_out():
    methods = {case["method"] for case in reference.NEWER_FEATURES.content["cases"].values()}

    assert methods == NEWER
    assert len(reference.NEWER_FEATURES.content["cases"]) == 18
    assert {case["method"] for case in reference.FEATURES.content["cases"].values()} >= OLDER
    assert len(reference.FEATURES.cases(*OLDER)) == 5


# CRD.

CRD_NAMES = {"embed_s.linear": "embed_student", "embed_t.linear": "embed_teacher"}
CRD_NAMES |= {"memory_v1": "student_bank_NE", "memory_v2": "teacher_bank_NE"}


@DTYPES
@cases("CRD")
def test_crd_is_the_official_one(name, dtype):
    steps = [Given(f"CRD/small_step{i + 1}", dtype, CRD_NAMES) for i in range(int(name[-1]))]
    params = steps[0].params
    term = CRDTerm(temperature=params["temperature"], momentum=params["momentum"], dim=params["feat_dim"])
    labels = torch.arange(params["n_data"]) % 3
    memory = term.module(shapes(term, [steps[0]["student"]], [steps[0]["teacher"]], labels_N=labels))
    steps[0].load(memory)

    for given in steps:
        memory.draw = lambda *_, given=given: given["contrast_index"]
        loss = term(lesson(term, [given["student"]], [given["teacher"]], sample_B=given["index"]), memory)

    given.holds(loss.total, loss.parts, memory)
    limit = given.limit
    expected = torch.tensor([given.case["Z_student"], given.case["Z_teacher"]], dtype=dtype)
    assert_close(memory.log_normalisers_2.exp(), expected, rtol=limit, atol=0)
    for bank, tensor in (("student_bank_NE", "memory_v1_after"), ("teacher_bank_NE", "memory_v2_after")):
        assert_close(getattr(memory, bank), given.vectors.tensor(given.case["tensors"][tensor], dtype))


def bank(count=9, dim=4, seed=1):
    return nn.functional.normalize(draw(count, dim, seed=seed), dim=1)


def test_crd_by_its_definition():
    student, teacher, student_bank, teacher_bank = (bank(n, seed=n) for n in (2, 3, 9, 10))
    teacher, teacher_bank = teacher[:2], teacher_bank[:9]
    contrast = torch.tensor([[0, 3, 4, 3], [5, 1, 2, 8]])

    loss = crd(student, teacher, student_bank, teacher_bank, contrast, temperature=0.5, n_data=9)

    for part, anchors, rows in (
        ("student_anchor", student, teacher_bank),
        ("teacher_anchor", teacher, student_bank),
    ):
        scores = [[(rows[j] @ anchor / 0.5).exp() for j in row] for anchor, row in zip(anchors, contrast, strict=True)]
        z = 9 * sum(sum(row) for row in scores) / 8
        expected = 0
        for positive, *negatives in scores:
            expected -= (positive / z / (positive / z + 3 / 9 + 1e-7)).log()
            expected -= sum((3 / 9 / (negative / z + 3 / 9 + 1e-7)).log() for negative in negatives)
        assert_close(loss.parts[part], expected / 2)


def test_crd_is_finite_at_a_temperature_at_which_scores_overflow():
    student, *others = (bank(count, seed=i).float() for i, count in enumerate((2, 2, 9, 9)))
    student.requires_grad_()
    contrast = torch.tensor([[0, 1], [2, 3]])

    total = crd(student, *others, contrast, temperature=1e-3, n_data=9).total
    total.backward()

    assert total.isfinite()
    assert student.grad.isfinite().all()


def test_negatives_are_training_samples_of_all_other_classes():
    labels = torch.tensor([0, 2, -1, 1, 0, 2, 1, -1, 3, 0])
    memory = ContrastiveMemory(3, 3, labels, dim=4)
    samples = torch.tensor([0, 1, 3, 8])

    drawn = memory.draw(samples, 4000)

    assert memory.n_data == 8
    assert torch.equal(drawn[:, 0], samples)
    for sample, row in zip(samples, drawn[:, 1:], strict=True):
        others = [i for i in range(10) if labels[i] >= 0 and labels[i] != labels[sample]]
        counts = row.bincount(minlength=10)
        assert counts.nonzero().flatten().tolist() == others
        assert counts[others].min() > 0.8 * 4000 / len(others)


@pytest.mark.parametrize("labels", [None, torch.zeros(5, dtype=torch.long)], ids=["several labels", "one class"])
def test_crd_needs_negatives(labels):
    with pytest.raises(ValueError, match="needs one label an image" if labels is None else "two classes"):
        CRDTerm().module(Shapes({Look(): (4,)}, {Look(): (4,)}, labels_N=labels))


def crd_step(training=True):
    torch.manual_seed(0)
    term = CRDTerm(dim=4, negatives=6)
    student, teacher = draw(3, 5).float(), draw(3, 7, seed=1).float()
    memory = term.module(shapes(term, [student], [teacher], labels_N=torch.arange(8) % 3)).train(training)
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    loss = term(lesson(term, [student], [teacher], sample_B=torch.tensor([1, 4, 6])), memory)
    loss.total.backward()
    return memory, before


def test_crd_remembers_in_training_alone():
    memory, before = crd_step(training=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.state_dict().items())

    memory, before = crd_step()
    changed = [i for i in range(8) if not torch.equal(memory.student_bank_NE[i], before["student_bank_NE"][i])]
    assert changed == [1, 4, 6]
    assert all(parameter.grad.abs().sum() > 0 for parameter in memory.parameters())


def test_crd_enters_the_samples_of_all_processes(monkeypatch):
    def gather(into, rows):
        # The other process has the next samples, with the opposite embeddings.
        into[0].copy_(rows)
        into[1].copy_(rows + 1 if rows.dtype == torch.int64 else -rows)

    alone, before = crd_step()
    monkeypatch.setattr(contrastive, "_processes", lambda: 2)
    monkeypatch.setattr(contrastive.distributed, "all_gather", gather)
    memory, _ = crd_step()

    assert torch.equal(memory.student_bank_NE[[1, 4, 6]], alone.student_bank_NE[[1, 4, 6]])
    old, fresh = before["student_bank_NE"], nn.functional.normalize(memory.embed_student(draw(3, 5).float()))
    assert_close(memory.student_bank_NE[[2, 5, 7]], nn.functional.normalize(old[[2, 5, 7]] - fresh))
    assert torch.equal(memory.student_bank_NE[[0, 3]], old[[0, 3]])
    mean = alone.log_normalisers_2.exp() / 2 + (-alone.log_normalisers_2).exp() / 2
    assert_close(memory.log_normalisers_2.exp(), mean)


# OFD.


@DTYPES
@cases("OFD")
def test_ofd_is_the_official_one(name, dtype):
    given = Given(name, dtype, {r"^teacher_bn": "!"})
    students, teachers = given["student"], given["teacher"]
    term = between(OFDTerm(), students, teachers)
    norms = {
        look: (given.weight(f"teacher_bn.{i}.weight"), given.weight(f"teacher_bn.{i}.bias"))
        for i, look in enumerate(term.needs.teacher_layers)
    }
    connectors = given.load(term.module(shapes(term, students, teachers, norms=norms)))
    for i, computed in enumerate(connectors.margins):
        official = given.vectors.tensor(given.case["tensors"][f"margin_{i}"], dtype)
        assert_close(computed, official, rtol=1e-6, atol=1e-6)
        setattr(connectors, f"margin_{i}", official)

    loss = term(lesson(term, students, teachers), connectors)

    given.holds(loss.total, loss.parts, connectors)


def test_ofd_by_its_definition():
    student, teacher, margin = draw(2, 3, 2, 2), draw(2, 3, 4, 4, seed=1), -draw(3, seed=2).abs() / 2

    total = ofd([student, student], [teacher, teacher], [margin, margin]).total

    expected = 0.0
    for b, d, i, j in torch.cartesian_prod(*map(torch.arange, student.shape)).tolist():
        s, t = student[b, d, i, j], teacher[b, d, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()
        target = t if t > 0 else max(t, margin[d])
        expected += (s - target) ** 2 / 2 if t > 0 or s > target else 0
    assert_close(total, 1.5 * expected)


@pytest.mark.parametrize(
    ("weight", "bias"), [(0.5, 0.3), (-2.0, 1.0), (1.0, -3.0), (0.1, 5.0), (0.0, -1.0), (0.0, 0.0)]
)
def test_margins_are_the_mean_of_what_is_negative(weight, bias):
    normal = draw(200_000) * abs(weight) + bias
    negative = normal[normal < 0]
    expected = negative.mean() if len(negative) > 200 else torch.tensor(-3 * abs(weight))

    margin = ofd_margins(torch.tensor([weight]), torch.tensor([bias]))

    assert_close(margin[0].double(), expected.double(), rtol=0.01, atol=1e-6)


def test_ofd_needs_the_batch_norm_of_the_teacher():
    maps = [draw(2, 3, 4, 4)]
    term = between(OFDTerm(), maps, maps)

    with pytest.raises(ValueError, match="stage1 has no batch norm"):
        term.module(shapes(term, maps, maps))


# ReviewKD.


@DTYPES
@cases("ReviewKD")
def test_review_kd_is_the_official_one(name, dtype):
    given = Given(name, dtype)
    students, teachers, params = given["student"], given["teacher"], given.params
    # The reference counts levels from the deepest.
    given.names = {rf"^{i}\.": f"levels:{len(students) - 1 - i}." for i in range(len(students))}
    given.names |= {"levels:": "levels.", r"\.conv1": ".reduce", r"\.conv2": ".expand", r"\.att_conv\.0": ".attention"}
    term = between(ReviewKDTerm(weight=params["weight"], warmup_epochs=params["warmup_epochs"]), students, teachers)
    (term,) = Weights([term]).at(params["epoch"])
    fusion = given.load(term.module(shapes(term, students, teachers)))
    assert fusion.levels[0].reduce[0].out_channels == params["mid_channels"]

    total = term.factor * term(lesson(term, students, teachers), fusion).total

    given.holds(total, {"loss_kd": total}, fusion)


def test_review_kd_compares_the_teacher_before_its_activation():
    layers = [{"student": "stage1", "teacher": "stage2"}]

    assert ReviewKDTerm(layers=layers).needs.teacher_layers == (Look("stage2", "preactivation"), Look())
    after = ReviewKDTerm(layers=layers, before_activation=False)
    assert after.needs.teacher_layers == (Look("stage2", "map"), Look())


def test_review_kd_of_one_level_by_its_definition():
    student, teacher = draw(2, 3, 3, 3), draw(2, 3, 3, 3, seed=1)

    total = review_kd([student], [teacher]).total

    pooled = [nn.functional.adaptive_avg_pool2d(student - teacher, size).square().mean() for size in (2, 1)]
    # The size of 4 is skipped with no weight.
    assert_close(total, ((student - teacher).square().mean() + pooled[0] / 2 + pooled[1] / 4) / 1.75)
    assert review_kd([teacher], [teacher]).total == 0


# SimKD.


@DTYPES
@cases("SimKD")
def test_sim_kd_is_the_official_one(name, dtype):
    given = Given(name, dtype, {r"^cls_t": "!"})
    student, teacher = given["student"], given["teacher"]
    classifier = given.weight("cls_t.weight"), given.weight("cls_t.bias")
    size = tuple(teacher.shape[2:]) if teacher.shape[2] < student.shape[2] else None
    module = Projection(student.shape[1], teacher.shape[1], size, reduction=given.params["factor"])
    projected = given.load(module)(student)
    logits = functional.linear(projected.mean((2, 3)), *classifier)

    loss = sim_kd(projected, teacher)

    given.holds(loss.total, loss.parts, module)
    assert_close(logits, given.vectors.tensor(given.case["tensors"]["logits"], dtype))
    assert_close(projected, given.vectors.tensor(given.case["tensors"]["projected"], dtype))


# SemCKD.

SEMCKD_NAMES = {r"query_(\d)": r"queries.\1", r"key_(\d)": r"keys.\1", "linear1": "0", "linear2": "2"}
SEMCKD_NAMES |= {r"regressor(\d)(\d)\.regressor": r"regressors.\1.\2"}


@DTYPES
@cases("SemCKD")
def test_sem_ckd_is_the_official_one(name, dtype):
    given = Given(name, dtype, SEMCKD_NAMES)
    students, teachers, params = given["student"], given["teacher"], given.params
    term = between(SemCKDTerm(reduction=params["factor"], soft=params["soft"]), students, teachers)
    module = given.load(term.module(shapes(term, students, teachers)))

    loss = term(lesson(term, students, teachers), module)

    given.holds(loss.total, loss.parts, module)
    query, key, error = module(students, teachers)
    for found, tensor in ((layer_attention(query, key, soft=params["soft"]), "attention"), (error, "pair_mse")):
        assert_close(found, given.vectors.tensor(given.case["tensors"][tensor], dtype))


def test_sem_ckd_without_a_preference_is_the_mean_over_all_pairs():
    query, key, error = torch.ones(4, 2, 3), torch.ones(4, 5, 3), draw(4, 2, 5).abs().float()

    assert_close(sem_ckd(query, key, error).total, error.mean())
    with pytest.raises(ValueError, match="needs errors of shape"):
        sem_ckd(query, key, error[:, :1])


def test_sem_ckd_takes_a_smaller_batch_and_no_larger_one():
    module = CrossLayerAttention([3], [2], batch_size=8)
    maps = [draw(9, 3, 2, 2).float()], [draw(9, 2, 2, 2, seed=1).float()]

    query, key, error = module(*([one[:5] for one in whose] for whose in maps))

    assert query.shape == key.shape == (5, 1, 2)
    assert error.shape == (5, 1, 1)
    with pytest.raises(ValueError, match="the batch has 9 samples and batch_size is 8"):
        module(*maps)
    with pytest.raises(ValueError, match="needs batches of 8 at least"):
        CrossLayerAttention([3], [2], batch_size=7)


# CAT-KD.


@DTYPES
@cases("CAT_KD")
def test_cat_kd_is_the_official_one(name, dtype):
    given = Given(name, dtype)
    labels = () if given.params.pop("only_cat") else (given["target"],)

    loss = cat_kd(given["student"], given["teacher"], *labels, **given.params)

    assert loss.parts.keys() == {component.lower() for component in given.case["components"]}
    given.holds(loss.total, {component: loss.parts[component.lower()] for component in given.case["components"]})


def test_class_activation_maps_average_to_the_logits():
    features, weight = draw(2, 3, 4, 4), draw(5, 3, seed=1)

    assert_close(class_activation_maps(features, weight).mean((2, 3)), features.mean((2, 3)) @ weight.T)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"cam_resolution": 2, "normalize": False}),
        (
            {"resolution": 3, "normalise": True, "binarise": True},
            {"cam_resolution": 3, "normalize": True, "binarize": True},
        ),
    ],
)
def test_the_term_of_cat_kd_takes_its_settings(settings, expected):
    term = CATKDTerm(**settings)
    student, teacher = draw(2, 5, 4, 4), draw(2, 5, 6, 6, seed=1)

    loss = term(lesson(term, [student], [teacher]))

    assert_close(loss.total, cat_kd(student, teacher, **expected).total)
    assert loss.parts.keys() == {"cat_kd"}


@pytest.mark.parametrize(("strategy", "count"), [(0, 3), (1, 5)])
def test_cat_kd_keeps_the_surest_classes_or_the_others(strategy, count):
    student, teacher = draw(2, 7, 2, 2), draw(2, 7, 2, 2, seed=1)

    total = cat_kd(student, teacher, cam_resolution=2, normalize=False, cams_nums=4, strategy=strategy).total

    order = teacher.mean((2, 3)).argsort(dim=1, descending=strategy == 0)
    errors = [(student[b, c] - teacher[b, c]).square().mean() for b in range(2) for c in order[b, :count]]
    assert_close(total, sum(errors) / len(errors))


# SRRL.


@DTYPES
@cases("SRRL")
def test_srrl_is_the_official_one(name, dtype):
    given = Given(name, dtype, {r"^cls_t": "!", r"^Connectors\.0": "0.conv", r"^Connectors\.1": "0.bn"})
    student, teacher = given["student"], given["teacher"]
    classifier = given.weight("cls_t.weight"), given.weight("cls_t.bias")
    term = SRRLTerm(beta=given.params["weight"], layers=[{"student": "a", "teacher": "b"}])
    teachers = [teacher.mean((2, 3)), teacher.mean((2, 3))]
    known = shapes(term, [student], teachers, classifier_CD=classifier[0], classifier_C=classifier[1])
    connectors = given.load(term.module(known))

    loss = term(lesson(term, [student], teachers), connectors)

    given.holds(loss.total, loss.parts, connectors)
    # The batch norm in training mode gives the same again.
    of_maps = srrl(connectors[0](student), teacher, *classifier, weight=given.params["weight"])
    assert_close(of_maps.total, loss.total)


@DTYPES
@cases("SRRL_pooled")
def test_srrl_of_vectors_is_the_official_one(name, dtype):
    given = Given(name, dtype, {r"^cls_t": "!", r"^transfer\.0": "conv", r"^transfer\.1": "bn"})
    student, teacher = given["student"], given["teacher"]
    classifier = given.weight("cls_t.weight"), given.weight("cls_t.bias")
    connector = given.load(ChannelConnector(student.shape[1], teacher.shape[1], *classifier))

    loss = srrl_pooled(connector(student), teacher, *classifier, weight=given.params["weight"])

    given.holds(loss.total, loss.parts, connector)


def test_srrl_needs_the_classifier_of_its_layer():
    looks = {Look("stage3", "map"): (4, 2, 2)}, {Look("stage3"): (6,), Look(): (8,)}
    term = SRRLTerm(layers=[{"student": "stage3", "teacher": "stage3"}])

    with pytest.raises(ValueError, match="takes 8 channels, its layer has 6"):
        term.module(Shapes(*looks, torch.zeros(10, 8)))
    with pytest.raises(ValueError, match="with a linear classifier"):
        term.module(Shapes(*looks))


# MGD.


@DTYPES
@cases("MGD")
def test_mgd_is_the_official_one(name, dtype):
    given = Given(name, dtype, {"^": "0."})
    student, teacher, mask, params = given["student"], given["teacher"], given["mask"], given.params
    settings = {"lambda_mgd": params["lambda_mgd"], "mask_kind": params["mask_kind"]}
    assert torch.equal(mgd_mask(given["uniform"], **settings), mask)
    term = MGDTerm(layers=[{"student": "a", "teacher": "b"}])
    generation = given.load(term.module(shapes(term, [student], [teacher])))
    generation[0].draw = lambda *_, **__: mask

    loss = term(lesson(term, [student], [teacher]), generation)

    total = mgd(generation[0](student, mask), teacher, alpha_mgd=params["alpha_mgd"]).total
    assert_close(total, params["alpha_mgd"] * loss.total)
    given.holds(total, loss.parts, generation)


@pytest.mark.parametrize(("mask_kind", "shape"), [("channel", (50, 40, 1, 1)), ("spatial", (50, 1, 6, 6))])
def test_a_share_of_the_map_is_hidden(mask_kind, shape):
    torch.manual_seed(0)

    mask = MaskedGeneration(3, 40).draw(draw(50, 3, 6, 6), lambda_mgd=0.3, mask_kind=mask_kind)

    assert mask.shape == shape
    assert 0.25 < 1 - mask.mean() < 0.35
    assert mask.unique().tolist() == [0, 1]


def test_mgd_needs_maps_of_one_size():
    term = MGDTerm(layers=[{"student": "a", "teacher": "b"}])

    with pytest.raises(ValueError, match="maps of one height and width"):
        term.module(shapes(term, [draw(2, 3, 4, 4)], [draw(2, 3, 2, 2)]))


# NORM.


def many_to_one(given):
    """The module, and the classifier of the student behind it."""
    student, teacher = given["student"], given["teacher"]
    module = nn.Module()
    module.body = ManyToOne(student.shape[1], teacher.shape[1], given.params["N"])
    module.fc = nn.Linear(student.shape[1], 10)
    given.names = {"layer31": "body.expand", "layer32": "body.reduce"}
    return given.load(module)


@DTYPES
@pytest.mark.parametrize("name", reference.NEWER_FEATURES.cases("NORM", "NORM_step"))
def test_norm_is_the_official_one(name, dtype):
    given = Given(name, dtype)
    module, params = many_to_one(given), given.params
    # The reference counts from 0.
    assert params["beta1"] == norm_beta1(params.pop("epoch") + 1)
    residual, expanded = module.body(given["student"])
    logits = module.fc(residual.mean((2, 3)))

    if given.case["method"] == "NORM":
        loss = norm(expanded, given["teacher"], **params)
    else:
        loss = norm_step(logits, given["logits_teacher"], given["target"], expanded, given["teacher"], **params)

    given.holds(loss.total, {**loss.parts, "beta1": torch.tensor(params["beta1"])}, module)
    for found, tensor in ((expanded, "expanded"), (residual.mean((2, 3)), "residual_pooled"), (logits, "logits")):
        assert_close(found, given.vectors.tensor(given.case["tensors"][tensor], dtype))


@DTYPES
@cases("NORM_imagenet")
def test_norm_for_imagenet_is_the_official_one(name, dtype):
    given = Given(name, dtype)
    assert given.params["beta1"] == norm_beta1(given.params.pop("epoch") + 1, imagenet=True)

    loss = norm_imagenet(given["student"], given["teacher"], **given.params)

    given.holds(loss.total, loss.parts)


def test_norm_is_the_sum_over_the_groups():
    expanded, teacher = draw(2, 6, 2, 2), draw(2, 3, 2, 2, seed=1)

    total = norm(expanded, teacher, N=2).total

    assert_close(total, sum((expanded[:, i : i + 3] - teacher).square().mean() for i in (0, 3)))


# DIST on dense predictions.


@DTYPES
@cases("DIST_dense")
def test_dist_on_dense_predictions_is_the_official_one(name, dtype):
    given = Given(name, dtype)

    loss = dist_dense(given["student"], given["teacher"], **given.params)

    given.holds(loss.total, loss.parts)


def test_dist_of_one_position_is_dist():
    student, teacher = draw(5, 4), draw(5, 4, seed=1)

    dense = dist_dense(student[:, :, None, None], teacher[:, :, None, None], temperature=2.0, beta=2.0, gamma=3.0)

    assert_close(4 * dense.total, dist(student, teacher, temperature=2.0, beta=2.0, gamma=3.0).total)


# All of them.

MAP, OTHER = (2, 6, 4, 4), (2, 6, 4, 5)
WRONG = {
    "crd": (lambda a, b: crd(a, b, a, a, torch.zeros(2, 3).long(), temperature=1.0, n_data=2), (2, 6), (2, 5)),
    "crd banks": (lambda a, b: crd(a, a, b, a, torch.zeros(2, 3).long(), temperature=1.0, n_data=2), (2, 6), (2, 5)),
    "crd numbers": (lambda a, b: crd(a, a, a, a, torch.zeros(2, 1).long(), temperature=1.0, n_data=2), (2, 6), (2, 6)),
    "ofd": (lambda a, b: ofd([a], [b], [a[0, :, 0, 0]]), MAP, (2, 5, 4, 4)),
    "ofd stages": (lambda a, b: ofd([a], [a, b], [a[0, :, 0, 0]]), MAP, MAP),
    "ofd margins": (ofd_margins, (3,), (4,)),
    "review_kd": (lambda a, b: review_kd([a], [b]), MAP, OTHER),
    "review_kd levels": (lambda a, b: review_kd([a], [a, b]), MAP, MAP),
    "review_kd fusion": (lambda a, b: ReviewFusion([a.shape[1:]], [b.shape[1:]]), MAP, MAP),
    "sim_kd": (sim_kd, MAP, (2, 5, 4, 4)),
    "sim_kd reduction": (lambda a, b: Projection(a.shape[1], b.shape[1], reduction=6), MAP, (2, 5, 4, 4)),
    "sem_ckd": (layer_attention, (2, 3, 4), (2, 3, 5)),
    "cat_kd": (lambda a, b: cat_kd(a, b, cam_resolution=2, normalize=False), MAP, (2, 5, 4, 4)),
    "cat_kd maps": (class_activation_maps, MAP, (10, 5)),
    "srrl": (lambda a, b: srrl(a, a, b), MAP, (10, 5)),
    "srrl_pooled": (lambda a, b: srrl_pooled(a, b, a), (6, 6), (6, 5)),
    "mgd": (mgd, MAP, OTHER),
    "norm": (lambda a, b: norm(a, b, N=2), MAP, (2, 4, 4, 4)),
    "norm sizes": (lambda a, b: norm(a, b, N=1), MAP, (2, 6, 6, 6)),
    "norm_imagenet": (lambda a, b: norm_imagenet([a], [a, b], N=1), MAP, MAP),
    "dist_dense": (dist_dense, MAP, OTHER),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    function, one, other = WRONG[name]

    with pytest.raises(ValueError, match=r"got|does not take|no whole multiple|the classifier takes"):
        function(draw(*one), draw(*other))


TERMS = {
    "crd": CRDTerm(dim=4, negatives=6),
    "ofd": OFDTerm(),
    "review-kd": ReviewKDTerm(),
    "sem-ckd": SemCKDTerm(),
    "srrl": SRRLTerm(),
    "mgd": MGDTerm(),
}


def prepared(name, scale=1.0, count=4):
    """A term with its module and a lesson of maps of two stages and vectors, which want gradients."""
    torch.manual_seed(0)
    term = TERMS[name]
    term = term.between(["stage1", "stage2"], ["stage1", "stage2"])

    def layer(look, channels, seed):
        size = 4 if look.layer == "stage1" else 2
        shape = (count, channels) if look.form == "vector" else (count, channels, size, size)
        return (scale * draw(*shape, seed=seed)).float().requires_grad_()

    students = [layer(look, 3, i) for i, look in enumerate(term.needs.student_layers)]
    teachers = [layer(look, 5, i + 10) for i, look in enumerate(term.needs.teacher_layers)]
    norms = {look: (torch.rand(5), torch.randn(5)) for look in term.needs.teacher_layers}
    given = shapes(
        term, students, teachers, classifier_CD=draw(2, 5).float(), labels_N=torch.arange(9) % 3, norms=norms
    )._replace(batch_size=8)
    sample = torch.arange(count)
    return term, term.module(given), lesson(term, students, teachers, sample_B=sample)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", TERMS)
def test_finite_and_only_the_student_learns(name, scale):
    term, module, given = prepared(name, scale)

    loss = term(given, module)
    loss.total.backward()

    assert loss.total.isfinite()
    assert all(one.grad.isfinite().all() for one in given.student.values())
    assert all(one.grad is None for one in given.teacher.values())
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    # Every parameter takes part in every step: DDP waits for each.
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("scale", [0.0, 1e4, 1e15])
def test_functions_without_a_term_are_finite(scale):
    student, teacher = (scale * draw(2, 6, 4, 4, seed=i).float() for i in range(2))
    student.requires_grad_()
    logits, labels = 1e15 * student.mean((2, 3)), torch.tensor([0, 5])

    losses = [
        sim_kd(student, teacher),
        cat_kd(student, teacher, labels, cam_resolution=2, normalize=True, cams_nums=3),
        norm_step(logits, teacher.mean((2, 3)), labels, student, teacher, N=1, alpha=1.0),
        dist_dense(student, teacher),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.total, student, retain_graph=True)
        assert loss.total.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
def test_autocast_changes_little(name):
    term, module, given = prepared(name)
    module.eval()
    torch.manual_seed(1)
    exact = term(given, module).total
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(given, module).total

    assert loss.dtype == torch.float32
    assert_close(loss, exact, rtol=0.05, atol=0.05)


def test_objectives_are_terms_of_a_recipe():
    supervised = {"cross-entropy": CrossEntropyTerm, "kd": KDTerm}
    for name, term in TERMS.items():
        (entries,) = type(term).objectives.values()
        assert entries[-1]["type"] == name
        for entry in entries:
            supervised.get(entry["type"], type(term)).model_validate(entry)
