"""Adam whose moments and weights are updated in one pass over memory."""

from typing import Any

import keras


class FusedAdam(keras.optimizers.Adam):
    """Keras's Adam, by TensorFlow's fused kernel where the backend is TensorFlow.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, in the order of computation just before
    section 2.1. Keras composes it of elementary operations, each a pass over arrays as large as the weights, which cost
    the reference CNN a tenth of its time in bfloat16 on 2 cores.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if keras.backend.backend() != "tensorflow" or self.amsgrad:
            super().update_step(gradient, variable, learning_rate)
            return
        import tensorflow as tf

        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=self.beta_1**step,
            beta2_power=self.beta_2**step,
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )
