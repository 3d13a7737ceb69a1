"""Many training steps in one call, compiled: by JAX, or by TensorFlow."""

from typing import Any

import keras
import numpy as np
from keras import ops

from deepfake_core.config import AugmentationParameters
from deepfake_core.training.degradation import blur, recolour, recompress, rescale, warp
from deepfake_core.training.kinds import measure_kinds


def make_steps(model: keras.Model, augmentation: AugmentationParameters, side: int) -> "JaxSteps | TensorFlowSteps":
    """Return the backend's steps.

    Args:
        model: compiled, and built inside `devices.spread_over` where several devices train.
        side: of the images that the model is trained on, in pixels.
    """
    kind = JaxSteps if keras.backend.backend() == "jax" else TensorFlowSteps
    return kind(model, augmentation, side)


class Steps:
    """What both backends share.

    `train` and `test` take a `Block`, and return the sum of the losses and the number of right answers, float (2,).
    Calls of `train` are between `begin` and `end`, after which the model has what was learned.
    """

    failure: type[Exception]
    """What the backend raises when an accelerator fails."""

    def __init__(self, model: keras.Model, augmentation: AugmentationParameters, side: int) -> None:
        self.model, self.augmentation, self.side = model, augmentation, side

    def begin(self) -> None:
        """Take the model's variables, where the backend computes on copies."""

    def end(self) -> None:
        """Write them back."""

    def _read(self, pixels: Any, batch: dict[str, Any]) -> Any:
        """Gather the images of a batch and change them; return float32 (n, side, side, 3)."""
        images = ops.take(pixels, batch["positions"], axis=0)
        if "matrices" not in batch:
            return ops.cast(images, "float32")
        augmentation = self.augmentation
        if augmentation.degrades:
            images = ops.cast(images, "float32")
        if augmentation.colours:
            images = recolour(images, batch["colours"])
        if augmentation.resize:
            images = rescale(images, batch["sides"])
        if augmentation.blur:
            images = blur(images, batch["radii"])
        if augmentation.recompression:
            images = recompress(images, batch["qualities"])
        return warp(images, batch["corners"], batch["matrices"], self.side, augmentation.resamples)

    @staticmethod
    def _measure(scores: Any, batch: dict[str, Any]) -> Any:
        """Return the sum of the losses (binary cross-entropy) and the number of right answers, float32 (2,)."""
        labels, weights = batch["labels"], batch["weights"]
        if scores.shape[-1] > 1:
            losses, right = measure_kinds(labels, scores)
        else:
            losses = ops.binary_crossentropy(labels, scores[:, 0])
            right = ops.cast(ops.equal(scores[:, 0] > 0.5, labels > 0.5), "float32")
        return ops.stack([ops.sum(losses * weights), ops.sum(right * weights)])


class JaxSteps(Steps):
    """Steps as one XLA loop; several devices share each batch by sharding."""

    def __init__(self, model: keras.Model, augmentation: AugmentationParameters, side: int) -> None:
        super().__init__(model, augmentation, side)
        import jax

        self.failure = jax.errors.JaxRuntimeError
        self._jax = jax
        self._distribution = keras.distribution.distribution()
        self._train = jax.jit(self._train_block, donate_argnums=0)
        self._test = jax.jit(self._test_block)

    def put(self, array: np.ndarray) -> Any:
        """Copy an array to the accelerators, whole to each, and wait for it."""
        sharding = None
        if self._distribution:
            mesh = self._distribution.device_mesh.backend_mesh
            sharding = self._jax.sharding.NamedSharding(mesh, self._jax.sharding.PartitionSpec())
        return self._jax.device_put(array, sharding).block_until_ready()

    def begin(self) -> None:
        self._state = tuple([variable.value for variable in group] for group in self._variables())

    def end(self) -> None:
        for group, values in zip(self._variables(), self._state, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)

    def train(self, block: Any) -> np.ndarray:
        self._state, totals = self._train(self._state, block.pixels, block.batches, block.steps)
        return np.asarray(totals)  # waits

    def test(self, block: Any) -> np.ndarray:
        trainable, fixed, _ = self._variables()
        values = [variable.value for variable in trainable], [variable.value for variable in fixed]
        return np.asarray(self._test(values, block.pixels, block.batches, block.steps))

    def _variables(self) -> tuple[list[Any], list[Any], list[Any]]:
        return self.model.trainable_variables, self.model.non_trainable_variables, self.model.optimizer.variables

    def _select(self, pixels: Any, batches: dict[str, Any], index: Any) -> tuple[Any, dict[str, Any]]:
        batch = {name: values[index] for name, values in batches.items()}
        if self._distribution:
            batch = {name: self._share(values) for name, values in batch.items()}
        return self._share(self._read(pixels, batch)), batch

    def _share(self, values: Any) -> Any:
        if not self._distribution:
            return values
        return keras.distribution.distribute_tensor(values, self._distribution.get_data_layout(values.shape))

    def _train_block(self, state: Any, pixels: Any, batches: dict[str, Any], count: Any) -> Any:
        def step(index: Any, carried: Any) -> Any:
            (trainable, fixed, moments), totals = carried
            images, batch = self._select(pixels, batches, index)

            def lose(trainable: Any, fixed: Any) -> Any:
                scores, fixed = self.model.stateless_call(trainable, fixed, images, training=True)
                found = self._measure(scores, batch)
                return found[0] / ops.sum(batch["weights"]), (fixed, found)

            gradients, (fixed, found) = self._jax.grad(lose, has_aux=True)(trainable, fixed)
            trainable, moments = self.model.optimizer.stateless_apply(moments, gradients, trainable)
            return (trainable, fixed, moments), totals + found

        return self._jax.lax.fori_loop(0, count, step, (state, ops.zeros(2)))

    def _test_block(self, values: Any, pixels: Any, batches: dict[str, Any], count: Any) -> Any:
        def step(index: Any, totals: Any) -> Any:
            images, batch = self._select(pixels, batches, index)
            scores, _ = self.model.stateless_call(*values, images, training=False)
            return totals + self._measure(scores, batch)

        return self._jax.lax.fori_loop(0, count, step, ops.zeros(2))


class TensorFlowSteps(Steps):
    """Steps as a loop in TensorFlow's graph; several devices share each batch by a MirroredStrategy."""

    def __init__(self, model: keras.Model, augmentation: AugmentationParameters, side: int) -> None:
        super().__init__(model, augmentation, side)
        import tensorflow as tf

        self.failure = tf.errors.OpError
        self._tf = tf
        self._strategy = tf.distribute.get_strategy()
        self._replicas = self._strategy.num_replicas_in_sync
        self._totals = tf.Variable(
            tf.zeros(2),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )
        self._train = self._loop(self._train_step)
        self._test = self._loop(self._test_step)

    def put(self, array: np.ndarray) -> Any:
        """Copy an array to the accelerators, whole to each."""
        tf = self._tf
        if self._replicas == 1:
            return tf.constant(array)

        def copy(context: Any) -> Any:
            with tf.device(self._strategy.extended.worker_devices[context.replica_id_in_sync_group]):
                return tf.identity(tf.constant(array))

        return self._strategy.experimental_distribute_values_from_function(copy)

    def train(self, block: Any) -> np.ndarray:
        return self._call(self._train, block)

    def test(self, block: Any) -> np.ndarray:
        return self._call(self._test, block)

    def _call(self, function: Any, block: Any) -> np.ndarray:
        batches = {name: self._tf.constant(values) for name, values in block.batches.items()}
        self._totals.assign(self._tf.zeros(2))
        function(block.pixels, batches, self._tf.constant(block.steps))
        return self._totals.numpy()

    def _loop(self, step: Any) -> Any:
        tf = self._tf
        compiled = tf.function(step, jit_compile=self._replicas == 1)  # as Keras: no XLA under a strategy

        @tf.function
        def run(pixels: Any, batches: dict[str, Any], count: Any) -> None:
            for index in tf.range(count):
                batch = {name: values[index] for name, values in batches.items()}
                self._strategy.run(compiled, args=(pixels, batch))

        return run

    def _share(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a batch that this replica takes."""
        replica = self._tf.distribute.get_replica_context().replica_id_in_sync_group
        width = batch["labels"].shape[0] // self._replicas
        return {name: values[replica * width : (replica + 1) * width] for name, values in batch.items()}

    def _train_step(self, pixels: Any, batch: dict[str, Any]) -> None:
        total = ops.sum(batch["weights"])
        batch = self._share(batch)
        images = self._read(pixels, batch)
        with self._tf.GradientTape() as tape:
            found = self._measure(self.model(images, training=True), batch)
            loss = found[0] / total
        variables = self.model.trainable_variables
        self.model.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        self._totals.assign_add(found)

    def _test_step(self, pixels: Any, batch: dict[str, Any]) -> None:
        batch = self._share(batch)
        self._totals.assign_add(self._measure(self.model(self._read(pixels, batch), training=False), batch))
