"""The game between a tokenizer and its discriminators: losses, penalties, balance of gradients.

Sources: hinge and non-saturating linear loss as in the published GRN tokenizer training
(arXiv 2604.13030), whose factor 1/2 stands here as well; R1 of Mescheder et al. 2018; LeCam of
Tseng et al. 2021; the adaptive weight of Esser et al. 2021. Logits are large for "real".

All is computed in float32 whatever comes in.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

DiscriminatorLoss = Literal["hinge", "vanilla"]


def discriminator_loss(
    real_logits: Float[Tensor, "*real"],
    fake_logits: Float[Tensor, "*fake"],
    *,
    kind: DiscriminatorLoss = "hinge",
) -> Float[Tensor, ""]:
    """Return what a discriminator minimizes: half the sum of its two means.

    | kind      | loss of a real logit  | loss of a fake logit |
    |-----------|-----------------------|----------------------|
    | "hinge"   | `max(0, 1 - logit)`   | `max(0, 1 + logit)`  |
    | "vanilla" | `log(1 + exp(-logit))`| `log(1 + exp(logit))`|

    Args:
        real_logits: Logits of data, any shape.
        fake_logits: Logits of reconstructions, any shape.
        kind: Row of the table.

    Returns:
        The loss; 1 ("hinge") or log 2 ("vanilla") for logits that are all 0.
    """
    real, fake = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        losses = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    else:
        losses = F.softplus(-real).mean() + F.softplus(fake).mean()
    return 0.5 * losses


def generator_loss(fake_logits: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    """Return what the tokenizer minimizes: minus the mean logit of its reconstructions."""
    return -fake_logits.float().mean()


def lecam_penalty(
    real_logits: Float[Tensor, "*real"],
    fake_logits: Float[Tensor, "*fake"],
    *,
    real_average: Float[Tensor, ""],
    fake_average: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Return LeCam's penalty of logits that leave the moving average of the other side.

    Args:
        real_logits: Logits of data, any shape.
        fake_logits: Logits of reconstructions, any shape.
        real_average: Moving average of the real logits' mean.
        fake_average: Moving average of the fake logits' mean.

    Returns:
        Mean squared excess of real logits over the fake average, and of the real average over fake
        logits: small where the two sides are not told apart.
    """
    above = F.relu(real_logits.float() - fake_average.float()).square().mean()
    below = F.relu(real_average.float() - fake_logits.float()).square().mean()
    return above + below


def r1_penalty(
    real_logits: Float[Tensor, "b *logits"], real: Float[Tensor, "b c *shape"]
) -> Float[Tensor, ""]:
    """Return R1: half the squared norm of the gradient of each sample's mean logit, on average.

    Args:
        real_logits: Logits of data, computed from `real` with gradients.
        real: The data; `requires_grad` must be set before the logits are computed.

    Returns:
        The penalty, with a graph, so that it can be minimized.
    """
    means = real_logits.float().flatten(1).mean(1)
    (gradient,) = torch.autograd.grad(means.sum(), real, create_graph=True)
    return 0.5 * gradient.float().flatten(1).square().sum(1).mean()


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    adversarial_loss: Float[Tensor, ""],
    weight: Float[Tensor, "*weight"],
    *,
    largest: float = 1e4,
) -> Float[Tensor, ""]:
    """Return the factor that gives both losses gradients of equal norm at one weight tensor.

    Args:
        reconstruction_loss: Sum of the terms that do not come from a discriminator.
        adversarial_loss: Sum of those that do.
        weight: Usually that of the decoder's last layer; both losses must depend on it.
        largest: Bound of the factor.

    Returns:
        `|gradient of the first| / |gradient of the second|` in [0, `largest`], without a graph.
    """
    norms = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0].float().norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, largest).detach()
