"""What there is to know of the gradients g_n of single examples, without writing them out.

Everything here takes what `jbackprop.backprop` gives, whose pairs (activation, delta) it contracts;
or what `deferred` gives, by which no pair is ever kept; or a tree of factored gradients.

g_n is always the gradient of the example's own cost C_n, divided by nothing. Others put the mean's
1/N in: a per-example gradient of BackPACK is ours over N where its loss takes the mean; those of
Opacus and of JAX Privacy are ours. What a result is divided by, its docstring says.
"""

from jbackprop.per_example.answers import dots as dots
from jbackprop.per_example.answers import gradient_chunks as gradient_chunks
from jbackprop.per_example.answers import gradients as gradients
from jbackprop.per_example.answers import gram as gram
from jbackprop.per_example.answers import gram_between as gram_between
from jbackprop.per_example.answers import norms as norms
from jbackprop.per_example.answers import project as project
from jbackprop.per_example.clipping import Clipped as Clipped
from jbackprop.per_example.clipping import clipped_gradient as clipped_gradient
from jbackprop.per_example.clipping import weighted_gradient as weighted_gradient
from jbackprop.per_example.moments import NoiseScale as NoiseScale
from jbackprop.per_example.moments import cosine_to_mean as cosine_to_mean
from jbackprop.per_example.moments import mean as mean
from jbackprop.per_example.moments import noise_scale as noise_scale
from jbackprop.per_example.moments import second_moment as second_moment
from jbackprop.per_example.moments import snr as snr
from jbackprop.per_example.moments import variance as variance
from jbackprop.per_example.noise import Noisy as Noisy
from jbackprop.per_example.noise import noisy_gradient as noisy_gradient
from jbackprop.per_example.source import Deferred as Deferred
from jbackprop.per_example.source import deferred as deferred
