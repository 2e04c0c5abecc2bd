from __future__ import annotations

from torch import Tensor, cos, exp, nn, sin
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import lecun_normal


class LRU(Cell):
    """Linear recurrent unit (Orvieto et al., 2023, arXiv:2303.06349, eq. 7 and appendix A).

    A diagonal complex recurrence, stored as a real and an imaginary state. The output is linear in the states
    and the input; D is a full matrix.

    Options:
        state_size: size of both states; 0: hidden_size
        r_min: smallest modulus of the eigenvalues at initialization
        r_max: largest modulus of the eigenvalues at initialization
        max_phase: largest phase of the eigenvalues at initialization, in radians

    Quantities:
        size: modulus of the eigenvalues
        turn: phase of the eigenvalues
        re: real part of the state
        im: imaginary part of the state
        y: output
    """

    state_size: int = 0
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 6.283185307179586

    state = {"y": "hidden", "re": "state_size or hidden", "im": "state_size or hidden"}
    nu = Param("state_size or hidden", init=lambda nu, cell: init_moduli(nu, cell))
    theta = Param("state_size or hidden", init=lambda theta, cell: init_phases(theta, cell))
    gamma = Param("state_size or hidden", init=lambda gamma, cell: init_normalization(gamma, cell))
    weight_b = Param("2*(state_size or hidden)", "input", init=lambda weight: init_complex(weight))
    weight_re = Param("hidden", "state_size or hidden", init=lecun_normal)
    weight_im = Param("hidden", "state_size or hidden", init=lecun_normal)
    weight_d = Param("hidden", "input", init=lecun_normal)

    def check(self) -> None:
        if self.state_size < 0 or not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(
                "state_size should be 0 or more and 0 <= r_min < r_max <= 1, got "
                f"state_size={self.state_size}, r_min={self.r_min}, r_max={self.r_max}"
            )

    def step(self, x: Tensor, y: Tensor, re: Tensor, im: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size, turn = exp(-exp(self.nu)), exp(self.theta)
        across, up = size * cos(turn), size * sin(turn)
        scale = exp(self.gamma)
        in_re, in_im = linear(x, self.weight_b).chunk(2, -1)
        re, im = across * re - up * im + scale * in_re, up * re + across * im + scale * in_im
        y = linear(re, self.weight_re) - linear(im, self.weight_im) + linear(x, self.weight_d)
        return y, re, im


def init_complex(weight: Tensor) -> None:
    """Fill real and imaginary parts so that their variances add up to 1/inputs."""
    nn.init.normal_(weight, 0, (2 * weight.shape[1]) ** -0.5)


def init_moduli(nu: Tensor, cell: LRU) -> None:
    """Draw nu so that the eigenvalues are uniform over the area of the ring (lemma 3.2)."""
    area = nn.init.uniform_(nu, cell.r_min**2, cell.r_max**2)
    nu.copy_((-0.5 * area.clamp(min=1e-38).log()).clamp(min=1e-38).log())


def init_normalization(gamma: Tensor, cell: LRU) -> None:
    """Choose gamma so that the states have the variance of the input (eq. 7)."""
    gamma.copy_(0.5 * (1 - exp(-2 * exp(cell.nu))).clamp(min=1e-38).log())


def init_phases(theta: Tensor, cell: LRU) -> None:
    """Draw theta so that the phases are uniform from 0 to ``max_phase``."""
    theta.copy_(nn.init.uniform_(theta, 0, cell.max_phase).clamp(min=1e-38).log())
