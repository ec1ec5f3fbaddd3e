"""Second derivatives of the mean cost: products, diagonals, Kronecker factors, spectra."""

from jbackprop.curvature.blocks import BlockDiagonal as BlockDiagonal
from jbackprop.curvature.blocks import Diagonal as Diagonal
from jbackprop.curvature.blocks import Eigen as Eigen
from jbackprop.curvature.blocks import Kronecker as Kronecker
from jbackprop.curvature.diagonals import diag_fisher as diag_fisher
from jbackprop.curvature.diagonals import diag_ggn as diag_ggn
from jbackprop.curvature.hessian import diag_hessian as diag_hessian
from jbackprop.curvature.hessian import estimate_diag_hessian as estimate_diag_hessian
from jbackprop.curvature.kfac import ekfac as ekfac
from jbackprop.curvature.kfac import kfac as kfac
from jbackprop.curvature.kfac import update_average as update_average
from jbackprop.curvature.operators import ggn_operator as ggn_operator
from jbackprop.curvature.operators import hessian_operator as hessian_operator
from jbackprop.curvature.products import fisher_product as fisher_product
from jbackprop.curvature.products import ggn_product as ggn_product
from jbackprop.curvature.products import hessian_product as hessian_product
from jbackprop.curvature.roots import Empirical as Empirical
from jbackprop.curvature.roots import Exact as Exact
from jbackprop.curvature.roots import MonteCarlo as MonteCarlo
from jbackprop.curvature.roots import Roots as Roots
from jbackprop.curvature.spectrum import Density as Density
from jbackprop.curvature.spectrum import spectral_density as spectral_density
from jbackprop.curvature.spectrum import top_eigenvalues as top_eigenvalues
from jbackprop.curvature.spectrum import trace_ggn as trace_ggn
from jbackprop.curvature.spectrum import trace_hessian as trace_hessian
