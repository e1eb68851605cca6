"""Another codec of the filtered feature f': a factorised prior in place of the hyperprior."""

import flax.linen as nn
import jax

from icm_jax import entropy, ops
from icm_jax.codecs import filter_codec, priors
from icm_jax.codecs.codec import Codec, Outputs, builder, method_of
from icm_jax.codecs.feature import filtered
from icm_jax.nets import resnet


class Plain(nn.Module):
    features: int
    channels: int

    def setup(self):
        self.down = nn.Conv(self.channels, (5, 5), strides=2)
        self.up = nn.ConvTranspose(self.features, (5, 5), strides=(2, 2))
        self.prior = entropy.Factorised()

    def __call__(self, f):
        y = self.down(f)
        return self.prior(y), self.up(y)

    def decode(self, y, shape):
        return ops.crop_to(self.up(y), *shape)


@builder("plain_feature")
def plain_codec(variant, width, filter_channels, filter_widths, channels) -> Codec:
    """Segment y, at 1/8 of the image; output "feature". It contains the information filter."""
    inner = filter_codec(variant, width, filter_channels, filter_widths)
    module = Plain(resnet.feature_channels(variant, width), channels)
    run = method_of(module, "plain")

    def init(key, image):
        variables = inner.init(key, image)
        f = filtered(inner, variables, {"image": image})
        variables["params"]["plain"] = module.init(jax.random.fold_in(key, 2), f)["params"]
        return variables

    def analyse(variables, inputs):
        return {"y": run(variables, filtered(inner, variables, inputs), method="down")}

    def feature_of(variables, decoded, shape):
        return run(variables, decoded["y"], [ops.halved(s, 2) for s in shape], method="decode")

    def bits(variables, y):
        return run(variables, y, method="prior")

    y = priors.factorised("y", priors.halvings(3, channels), bits, ("plain", "prior"))
    return Codec((*inner.parts, "plain"), init, analyse, (y,), Outputs(feature=feature_of))
