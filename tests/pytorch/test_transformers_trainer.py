"""Prune, distill and quantize inside Hugging Face's Trainer, by the real one, on a small BERT and a small GPT-2."""

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")

import whet  # noqa: E402
from whet import QAT, Cubic, Distill, EarlyStopping, Int, Prune, Quantize, SoftTargets  # noqa: E402
from whet.errors import ModelError, SpecError  # noqa: E402
from whet.torch.transformers import WhetCallback  # noqa: E402

RAMP = Prune(0.6, schedule=Cubic(end=0.5, frequency=1))
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
RATES = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(layers=1, seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(num_hidden_layers=layers, **SIZES, **RATES, attn_implementation="eager")
    return transformers.BertForSequenceClassification(config)


def rows(n=24, length=6):
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 32, (n, length))
    mask = np.ones_like(ids)
    mask[::3, 4:] = 0
    return [
        {"input_ids": torch.from_numpy(i), "attention_mask": torch.from_numpy(m), "labels": torch.tensor(int(i[0]) % 3)}
        for i, m in zip(ids, mask, strict=True)
    ]


def train(model, callback, folder, resume=None, **options):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no"} | options
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, seed=0, logging_strategy="no", **options
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(9), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def states_differ(one, other):
    return max(float((tensor - other.state_dict()[name]).abs().max()) for name, tensor in one.state_dict().items())


def test_the_loss_is_the_models_own_and_the_teachers(tmp_path):
    model, teacher = bert(), bert(2, seed=5).eval()
    batch = {key: torch.stack([row[key] for row in rows()[:8]]) for key in ("input_ids", "attention_mask", "labels")}
    seen = []

    class Sees(WhetCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            super().on_train_begin(args, state, control, model=model, **kwargs)
            own = model.eval()(**batch)
            taught = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            expected = 0.3 * own.loss + 0.7 * whet.torch.soft_targets(own.logits, taught, temperature=2.0)
            seen.append((float(model.train()(**batch).loss.detach()), float(expected.detach()), float(own.loss.detach())))

    callback = Sees([Distill([SoftTargets(temperature=2.0)], student_weight=0.3)], teacher=teacher)
    train(model, callback, tmp_path, num_train_epochs=1)
    found, expected, own = seen[0]
    assert found == pytest.approx(expected, rel=1e-5) and abs(found - own) > 1e-3
    with torch.no_grad():  # the hooks are gone
        assert float(model.train()(**batch).loss) == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)


def test_pruning_reaches_its_sparsity_and_accumulated_gradients_are_those_of_one_batch(tmp_path):
    teacher, models = bert(2, seed=5), [bert(), bert()]
    for model, size, accumulate in ((models[0], 8, 1), (models[1], 4, 2)):
        # The teacher alone: a BERT's own loss is a mean, which this Trainer does not divide by the accumulated steps.
        callback = WhetCallback([RAMP, Distill([SoftTargets()], student_weight=0)], teacher=teacher)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0}
        trainer = train(model, callback, tmp_path, optim="sgd", learning_rate=0.1, **options)
        assert trainer.state.global_step == 6 and callback.sparsity == pytest.approx(0.6, abs=0.02) and callback.is_done
        assert all((model.get_parameter(name)[torch.from_numpy(m) == 0] == 0).all() for name, m in callback.masks.items())
    assert states_differ(*models) < 1e-4


def test_a_resumed_training_ends_as_an_undisturbed_one(tmp_path):
    teacher, whole = bert(2, seed=5), bert()
    apply = [RAMP, Distill([SoftTargets()])]
    train(whole, WhetCallback(apply, teacher=teacher), tmp_path / "a", save_strategy="epoch")
    assert (tmp_path / "a" / "checkpoint-3" / "whet.pt").exists()
    resumed, callback = bert(seed=9), WhetCallback(apply, teacher=teacher)
    trainer = train(resumed, callback, tmp_path / "a", str(tmp_path / "a" / "checkpoint-3"), save_strategy="no")
    assert trainer.state.global_step == 6 and callback.sparsity == pytest.approx(0.6, abs=0.02)
    assert states_differ(whole, resumed) < 1e-6
    (tmp_path / "a" / "checkpoint-3" / "whet.pt").unlink()
    with pytest.raises(SpecError, match=r"goes on at step 3, and there is no .*whet\.pt"):
        train(bert(), WhetCallback(apply, teacher=teacher), tmp_path / "a", str(tmp_path / "a" / "checkpoint-3"))


def test_quantization_aware_training_and_early_stopping(tmp_path):
    model, teacher = bert(), bert(2, seed=5)
    callback = WhetCallback([RAMP], early_stopping=EarlyStopping(patience=1))
    train(model, callback, tmp_path, eval_strategy="epoch", num_train_epochs=6)
    assert callback.sparsity == pytest.approx(0.6, abs=0.02)
    batch = {key: np.stack([row[key].numpy() for row in rows()]) for key in ("input_ids", "attention_mask")}
    spec = Quantize(Int(8), qat=QAT())
    prepared = whet.torch.prepare(model, spec, calibration=batch, masks=callback.masks, progress=False)
    second = WhetCallback([Distill([SoftTargets()])], teacher=teacher)
    train(prepared, second, tmp_path, num_train_epochs=1)
    made = whet.finish(prepared, example=batch, masks=callback.masks)
    weight = made.float_model.bert.encoder.layer[0].intermediate.dense.weight.detach().numpy()
    assert np.mean(weight == 0) > 0.3 and "Int" in str(made.plan.weights)
    prepared.eval()
    tensors = {key: torch.from_numpy(array) for key, array in batch.items()}
    with torch.no_grad():
        np.testing.assert_allclose(made.model(**tensors).logits, prepared(**tensors).logits, atol=1e-4)


def test_a_causal_models_next_tokens_are_the_labels(tmp_path):
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    student, teacher = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    callback = WhetCallback([Distill([SoftTargets()])], teacher=teacher)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.0)
    callback.on_train_begin(arguments, transformers.TrainerState(max_steps=3), None, model=student)
    ids = torch.tensor([[3, 4, 5, 6]])
    student.train()(input_ids=ids, labels=ids)
    assert callback._techniques.targets.tolist() == [[4, 5, 6, -100]]
    callback.close()
    assert not student._forward_hooks and not student._forward_pre_hooks


def test_a_loss_that_is_computed_elsewhere_is_told(tmp_path):
    def apply():
        return WhetCallback([Distill([SoftTargets()])], teacher=bert(2, seed=5))

    with pytest.raises(SpecError, match="label_smoothing_factor"):
        train(bert(), apply(), tmp_path, label_smoothing_factor=0.1)

    def elsewhere(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(bert(), arguments, train_dataset=rows(), callbacks=[apply()], compute_loss_func=elsewhere)
    with pytest.raises(ModelError, match=r"returned no loss|nothing of the teacher's loss was in it"):
        trainer.train()
