"""How operations of matrices are kept finite: the makers of changes for factors, inverses and correlations."""

from postmortem.rules import RULES, rule
from postmortem.source_tree import Edit

__all__ = ["RULES"]  # those of rules.py with these


@rule("qr svd", "linalg_qr linalg_svd div")
def dependent_columns(line, operation):
    """Add a small diagonal whose entries differ, for dependent columns and equal singular values have no slope."""
    start, end, text = line.source.operand(operation.operands[0])
    for size in ("1e-6", "1e-4", "1e-2"):
        like = f"dtype={text}.dtype, device={text}.device"
        eye = f"torch.eye({text}.shape[-2], {text}.shape[-1], {like})"
        ramp = f"torch.linspace({size}, 2 * {size}, {text}.shape[-1], {like})"
        yield f"add a diagonal of {size}", [Edit(start, end, f"{text} + {eye} * {ramp}")]


@rule("corrcoef", "div true_divide")
def correlation_of_a_constant(line, operation):
    """Divide the covariance by a root of variances that has a floor: what never changes correlates with nothing."""
    text = line.source.code(operation.operands[0])
    for floor in ("1e-12", "1e-8"):
        spread = f"torch.cov({text}).diagonal().clamp(min={floor}).sqrt()"
        change = f"(torch.cov({text}) / torch.outer({spread}, {spread})).clamp(-1, 1)"
        yield (
            f"divide by deviations of which the squares are {floor} or above",
            [line.source.replaced(operation.node, change)],
        )


@rule("eigh eigvalsh", "linalg_eigh div")
def equal_eigenvalues(line, operation):
    """Split equal eigenvalues, whose vectors have no slope, with a small diagonal."""
    start, end, text = line.source.operand(operation.operands[0])
    for width in ("1e-6", "1e-5", "1e-4"):
        ramp = f"torch.linspace(0, {width}, {text}.shape[-1], dtype={text}.dtype, device={text}.device)"
        yield (
            f"split equal eigenvalues with a diagonal of 0 to {width}",
            [Edit(start, end, f"{text} + torch.diag({ramp})")],
        )


@rule(
    "inv inv_ex inverse cholesky cholesky_ex solve solve_ex pinv",
    "linalg_inv_ex linalg_inv linalg_cholesky_ex linalg_cholesky linalg_solve_ex linalg_solve div",
)
def singular_matrix(line, operation):
    """Add a small diagonal to a matrix that has no inverse."""
    start, end, text = line.source.operand(operation.operands[0])
    for size in ("1e-6", "1e-4", "1e-2"):
        eye = f"torch.eye({text}.shape[-1], dtype={text}.dtype, device={text}.device)"
        yield f"add a diagonal of {size}", [Edit(start, end, f"({text} + {size} * {eye})")]


@rule("logdet", "scalar_tensor where log")
def negative_determinant(line, operation):
    """Take the logarithm of the determinant's size, whatever its sign."""
    text = line.source.code(operation.operands[0])
    change = f"torch.linalg.slogdet({text}).logabsdet"
    yield "use slogdet, which takes the sign apart", [line.source.replaced(operation.node, change)]
