"""Quantization-aware training in Keras: gradients by the formula, from the post-training solution to a plan, in every loop."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import zoo_keras
from keras_parts import batches, dense, points
from other_backend import run_under
from whet.data import Batches
from whet.errors import ModelError, SpecError
from whet.graph.epochs import TrainingRun
from whet.graph.learning import into_bins
from whet.keras import convert, finish, predict, prepare, quantize, simulate
from whet.keras.learned import LearnedQuantize, fused_round_through, learned_scale, round_through
from whet.keras.prune import prune
from whet.keras.qat import quantize_aware
from whet.keras.quantize import quantized_view
from whet.keras.trace import lowered
from whet.numerics.affine import QParams
from whet.specs import QAT, TARGETS, EarlyStopping, Int, Metric, PerGroup, PerTensor, Prune, Quantize, Train

L = keras.layers
LITERT = TARGETS["litert"]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LOW = Quantize(Int(3), Int(4, symmetric=False, granularity=PerTensor()), qat=QAT())


def flat(outputs):
    return [np.asarray(item) for item in keras.tree.flatten(outputs)]


def trained_by_hand(prepared, steps=1, rate=1e-2, **options):
    prepared.compile(keras.optimizers.Adam(rate), LOSS, **options)
    x, y = points(64)
    return [float(prepared.train_on_batch(x, y)) for _ in range(steps)]


def same_within_a_code(found, wanted, plan):
    step = max(float(params.scale) for params in plan.values.values())
    assert np.abs(found - wanted).max() <= 1.01 * step and np.mean(np.abs(found - wanted) < 1e-5) > 0.9


def test_gradients_are_those_of_lsq():
    rng = np.random.default_rng(0)
    x, g, s, low, high = rng.normal(size=999) * 6, rng.normal(size=999), 0.7, -8.0, 7.0
    v = x / s
    inside = (v >= low) & (v <= high)
    by_scale = np.sum(g * np.where(inside, np.round(v) - v, np.clip(np.round(v), low, high)))
    with tf.GradientTape() as tape:
        xs, scale = tf.constant(x), tf.constant(s, tf.float64)
        tape.watch([xs, scale])
        y = round_through(xs, scale, low, high)
    by_x, of_scale = tape.gradient(y, [xs, scale], output_gradients=tf.constant(g))
    np.testing.assert_allclose(y, s * np.clip(np.round(v), low, high), rtol=1e-12)
    np.testing.assert_allclose(by_x, np.where(inside, g, 0), atol=1e-12)
    np.testing.assert_allclose(of_scale, by_scale, rtol=1e-10)
    assert not inside.all() and abs(by_scale) > 1


@pytest.mark.parametrize(("bits", "low", "high", "narrow"), [(8, 0, 255, False), (4, -5, 10, False), (8, -127, 127, True)])
def test_the_fused_operator_is_the_formula(bits, low, high, narrow):
    rng = np.random.default_rng(1)
    x, g = (rng.normal(size=(64, 33)) * 9).astype("float32"), rng.normal(size=(64, 33)).astype("float32")
    found = []
    for rule in (lambda a, b: round_through(a, b, low, high), lambda a, b: fused_round_through(a, b, low, high, bits, narrow)):
        with tf.GradientTape() as tape:
            xs, scale = tf.constant(x), tf.constant(0.13)
            tape.watch([xs, scale])
            y = rule(xs, scale)
        found.append([np.asarray(item) for item in (y, *tape.gradient(y, [xs, scale], output_gradients=tf.constant(g)))])
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-6)
    np.testing.assert_allclose(found[1][2], found[0][2], rtol=1e-3, atol=1e-2)


def test_a_step_of_sgd_moves_the_scale_as_if_it_were_trained_itself():
    base, factor, count, high, rate = 0.02, tf.Variable(1.0), 50, 7.0, 1e-3
    with tf.GradientTape() as tape:
        loss = 3.0 * learned_scale(tf.constant(base), factor, count, high)
    factor.assign_sub(rate * tape.gradient(loss, factor))
    moved = base * float(factor) - base
    np.testing.assert_allclose(moved, -rate * 3.0 / np.sqrt(count * high), rtol=1e-3)
    dead = learned_scale(tf.constant(2.0**-60), tf.Variable(1.0), count, high)
    assert float(dead) == 2.0**-60


@pytest.mark.parametrize("name", ["digits_cnn", "depthwise", "nested_functional", "shared_layer", "attention_layer"])
def test_it_begins_at_the_post_training_solution(name):
    model, x = zoo_keras.CASES[name]()
    before = model.get_weights()
    prepared = prepare(model, Quantize(qat=QAT()), calibration=[x], target="litert", progress=False)
    plan, _ = quantize(model, Quantize(), LITERT, calibration=Batches([x]), example=x, progress=False)
    wanted = flat(predict(simulate(model, plan), x))
    for found, there in zip(flat(predict(prepared, x)), wanted, strict=True):
        same_within_a_code(found, there, plan)
    float_model, finished = finish(prepared)
    for there, again in zip(wanted, flat(predict(simulate(float_model, finished), x)), strict=True):
        np.testing.assert_allclose(again, there, atol=1e-6)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert {name: q.scale.shape for name, q in finished.weights.items()} == {n: q.scale.shape for n, q in plan.weights.items()}


@pytest.mark.parametrize("name", ["residual_add", "depthwise", "dense_reshape_transposed"])
def test_what_was_trained_is_what_the_plan_says(name):
    model, x = zoo_keras.CASES[name]()
    prepared = prepare(model, LOW, calibration=[x], target="litert", progress=False)
    prepared.compile(keras.optimizers.Adam(3e-3), "mse")
    start = flat(predict(prepared, x))[0]
    prepared.fit(x, np.zeros_like(start), epochs=3, batch_size=len(x), verbose=0)
    found = flat(prepared(x, training=False))[0]
    float_model, plan = finish(prepared)
    assert np.mean(found**2) < np.mean(start**2)
    same_within_a_code(found, flat(predict(simulate(float_model, plan), x))[0], plan)
    stored, again = convert(prepared), convert(float_model, plan)  # prepare, train, convert: without the plan in between
    assert all(np.array_equal(one, other) for one, other in zip(stored.get_weights(), again.get_weights(), strict=True))
    untrained, _ = quantize(model, LOW, LITERT, calibration=Batches([x]), example=x, progress=False)
    assert all(not np.array_equal(plan.weights[n].scale, q.scale) for n, q in untrained.weights.items())
    assert any(plan.values[n].scale != q.scale for n, q in untrained.values.items())
    program, layers = lowered(float_model, x), [c.operation for c in prepared._whet.program.calls]
    kernels = {id(layer): np.asarray(layer.kernel) for layer in layers if hasattr(layer, "quantizer")}
    stored = [plan.rounded(n, np.asarray(quantized_view(program.kernels[n]).array, np.float32)) for n in plan.weights]
    sums = [sorted(float(np.sum(a**2)) for a in arrays) for arrays in (kernels.values(), stored)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    converted = convert(float_model, plan)
    np.testing.assert_array_equal(flat(predict(converted, x))[0], flat(predict(simulate(float_model, plan), x))[0])


def test_shared_scales_stay_shared_and_fixed_ones_fixed():
    model, x = zoo_keras.concat_same()
    prepared = prepare(model, LOW, calibration=[x], target="litert", progress=False)
    prepared.compile(keras.optimizers.Adam(1e-2), "mse")
    prepared.train_on_batch(x, np.zeros_like(flat(predict(prepared, x))[0]))
    _, plan = finish(prepared)
    before, _ = quantize(model, LOW, LITERT, calibration=Batches([x]), example=x, progress=False)
    groups = {}
    for name, params in before.values.items():
        groups.setdefault(id(params), []).append(name)
    assert any(len(names) > 1 for names in groups.values())
    for names in groups.values():
        assert len({float(plan.values[name].scale) for name in names}) == 1
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, activation="softmax", name="b")])
    x, y = points(32)
    prepared = prepare(model, LOW, calibration=[x], target="litert", progress=False)
    prepared.compile("adam", "sparse_categorical_crossentropy")
    prepared.train_on_batch(x, y)
    np.testing.assert_allclose(prepared(x).numpy().sum(-1), 1, atol=1e-5)  # the loss sees probabilities
    assert float(finish(prepared)[1].values["b/softmax:0"].scale) == 1 / 256


def test_pruned_weights_stay_zero_through_training_and_in_the_codes():
    model = dense()
    masks, _ = prune(model, Prune(0.5), masks={})
    prepared = prepare(
        model, Quantize(Int(4), qat=QAT(), keep=("out",)), calibration=[points()[0]], masks=masks, progress=False
    )
    trained_by_hand(prepared, 5)
    float_model, plan = finish(prepared)
    for name, mask in masks.items():
        kernel = np.asarray(float_model.get_layer(name.split("/")[0]).kernel)
        assert not kernel[mask == 0].any() and kernel[mask == 1].any()
        assert not np.signbit(kernel[mask == 0]).any()
    assert list(plan.weights) == ["hidden/kernel"]
    assert not plan.encode("hidden/kernel", np.asarray(float_model.get_layer("hidden").kernel))[
        masks["hidden/kernel"] == 0
    ].any()
    with pytest.raises(ModelError, match="nowhere/kernel"):
        prepare(model, LOW, calibration=[points()[0]], masks={"nowhere/kernel": np.ones((4, 8), np.uint8)}, progress=False)


def test_ranges_are_observed_for_a_part_of_training_and_then_frozen():
    model = dense()
    x, y = points(64)
    spec = Quantize(qat=QAT(learn_scale=False, observe=0.5))
    prepared = prepare(model, spec, calibration=[x], steps=4, progress=False)
    prepared.compile(keras.optimizers.SGD(0.0), LOSS)
    entry = next(layer for layer in prepared.layers if isinstance(layer, LearnedQuantize) and "input" in layer.name)
    first = entry.solved()
    seen = []
    for _ in range(4):
        prepared.train_on_batch(3 * x, y)
        prepared.evaluate(100 * x, y, verbose=0)  # looking on changes nothing
        seen.append(float(np.asarray(entry.high)[0]))
    start = float((entry.codes.qmax - first[1]) * first[0])
    once = 0.9 * start + 0.1 * 3 * float(x.max())
    twice = 0.9 * once + 0.1 * 3 * float(x.max())
    np.testing.assert_allclose(seen, [once, twice, twice, twice], rtol=1e-4)
    scale, _ = entry.solved()
    assert scale > first[0] and finish(prepared)[1].values["input:0"].scale == np.float32(scale)
    with pytest.raises(SpecError, match="steps="):
        prepare(model, spec, calibration=[x], progress=False)


def test_observed_ranges_do_not_train_until_they_are_frozen():
    layer = LearnedQuantize(0.1, 0, learn=True, observe=1, members=1)
    x = tf.constant(np.linspace(0, 40, 100, dtype="float32")[None])
    gradients = []
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=True))
        gradients.append(tape.gradient(loss, layer.factor.value))
    assert gradients[0] is None or float(gradients[0]) == 0
    assert float(gradients[1]) != 0


def test_a_chosen_code_is_where_its_weight_begins():
    params = QParams(np.float32([0.1]), np.int32([0]), Int(3), 1)
    array = np.float32([[0.31], [-0.9], [0.04], [0.2]])
    codes = np.int32([[2], [-4], [1], [2]])
    moved = into_bins(array, params, codes)
    np.testing.assert_array_equal(params.encode(moved), codes)
    np.testing.assert_allclose(moved[[1, 3]], array[[1, 3]])
    assert moved[0] < 0.25 < array[0] and abs(moved[0] - 0.25) < 1e-3


def test_saved_and_resumed_training_goes_on_the_same(tmp_path):
    model, x = dense(), points(64)[0]
    one = prepare(model, LOW, calibration=[x], progress=False)
    trained_by_hand(one, 2)
    one.save(tmp_path / "half.keras")
    one.save_weights(tmp_path / "half.weights.h5")
    half = one.get_weights()
    wanted = trained_by_hand(one, 2)
    loaded = keras.models.load_model(tmp_path / "half.keras", compile=False)
    assert all(np.array_equal(a, b) for a, b in zip(half, loaded.get_weights(), strict=True))
    losses = trained_by_hand(loaded, 8)
    assert losses[0] == pytest.approx(wanted[0], rel=0.1) and losses[-1] < losses[0]  # its biases are not rounded
    again = prepare(model, LOW, calibration=[x], progress=False)
    again.load_weights(tmp_path / "half.weights.h5")
    assert trained_by_hand(again, 2) == pytest.approx(wanted, rel=1e-5)
    for first, second in zip(finish(one)[1].weights.values(), finish(again)[1].weights.values(), strict=True):
        np.testing.assert_allclose(second.scale, first.scale, rtol=1e-5)
    with pytest.raises(ModelError, match=r"load_weights"):
        finish(loaded)


def test_a_distribution_strategy_and_xla_train_the_same():
    model, x = dense(), points(64)[0]
    plain = trained_by_hand(prepare(model, LOW, calibration=[x], progress=False), 3)
    assert trained_by_hand(prepare(model, LOW, calibration=[x], progress=False), 3, jit_compile=True) == pytest.approx(
        plain, 1e-2
    )
    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
    with strategy.scope():
        mirrored = prepare(
            model, Quantize(LOW.weights, LOW.activations, qat=QAT(observe=0.5)), calibration=[x], steps=4, progress=False
        )
        mirrored.compile(keras.optimizers.Adam(1e-2), LOSS)
    history = mirrored.fit(*points(64), epochs=12, batch_size=64, verbose=0, shuffle=False).history["loss"]
    assert history[-1] < history[0] and finish(mirrored)[1].weights


def test_groups_and_asymmetric_weights_train():
    x, _ = points(64)
    for weights in (Int(3, granularity=PerGroup(3)), Int(3, symmetric=False), Int(4, granularity=PerTensor())):
        model = dense()
        prepared = prepare(model, Quantize(weights, None, qat=QAT()), example=x, progress=False)
        plan, _ = quantize(model, Quantize(weights, None), LITERT, calibration=None, example=x, progress=False)
        np.testing.assert_allclose(predict(prepared, x), predict(simulate(model, plan), x), atol=1e-6)
        losses = trained_by_hand(prepared, 12)
        assert losses[-1] < losses[0]
        np.testing.assert_allclose(predict(simulate(*finish(prepared)), x), np.asarray(prepared(x)), atol=1e-5)


def test_the_verb_trains_the_float_model_in_place_and_gives_the_plan():
    x, y = points(96)
    keras.utils.set_random_seed(0)  # untrained weights that do badly: what it starts from is asserted below
    model = dense()
    spec = LOW
    plan, _ = quantize(model, spec, LITERT, calibration=Batches([x]), example=x, progress=False)

    def right(current, its_plan):
        return np.mean(predict(simulate(current, its_plan), x).argmax(-1) == y)

    before = right(model, plan)
    fit = Train(epochs=10, learning_rate=2e-2)
    run = TrainingRun(train=batches(), val=batches("val", 40, seed=1), progress=False)
    trained, step = quantize_aware(model, spec, plan, fit, run)
    assert before < 0.6 and right(model, trained) > 0.8
    assert [row["algorithm"] for row in step.changed] == ["QAT", "QAT"] and step.changed[0]["scheme"] == "int3 per channel"
    assert len(step.train["history"]) == 10 and step.spec["Quantize"]["qat"] is not None


def test_no_epoch_is_best_before_ranges_are_frozen():
    calls = []

    def worse_every_time(outputs, targets):
        calls.append(len(targets))
        return -float(len(calls))

    val = batches("val", 40, seed=1)
    spec, model = Quantize(Int(4), qat=QAT(observe=0.6)), dense()
    plan, _ = quantize(model, spec, LITERT, calibration=batches("calibration"), example=points(8)[0], progress=False)
    metric = Metric(worse_every_time, per_example=False)
    run = TrainingRun(train=batches(), val=val, metric=metric, progress=False)
    _, step = quantize_aware(model, spec, plan, Train(epochs=4, early_stopping=EarlyStopping(patience=1)), run)
    assert [row["eligible"] for row in step.train["history"]] == [False, False, True, True]
    assert step.train["stop"]["best_epoch"] == 3 and len(calls) == 4


TORCH = """
import keras, numpy as np
from keras_parts import dense, points
from whet.keras import finish, predict, prepare, simulate
from whet.specs import QAT, Int, PerTensor, Quantize
keras.utils.set_random_seed(0)
x, y = points(64)
spec = Quantize(Int(3), Int(4, symmetric=False, granularity=PerTensor()), qat=QAT(observe=0.5))
prepared = prepare(dense(), spec, calibration=[x], target="openvino", steps=8, progress=False)
prepared.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
losses = [float(prepared.train_on_batch(x, y)) for _ in range(12)]
assert losses[-1] < losses[0], losses
found = predict(simulate(*finish(prepared)), x)
np.testing.assert_allclose(found, predict(prepared, x), atol=2 * max(float(p.scale) for p in finish(prepared)[1].values.values()))
print(keras.backend.backend())
"""


def test_the_torch_backend_trains_too():
    pytest.importorskip("torch")
    assert run_under("torch", TORCH) == "torch\n"


def test_what_cannot_be_trained_is_refused():
    x = points(32)[0]
    from whet.specs import KMeans

    with pytest.raises(SpecError, match=r"KMeans.*overrides"):
        prepare(dense(), Quantize(KMeans(4), None, qat=QAT()), example=x, progress=False)
    with pytest.raises(ModelError, match=r"was not made by whet\.keras\.prepare"):
        finish(dense())
