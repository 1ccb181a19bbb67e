"""Products of spectral norms, and the Lipschitz constants of single layers against their Jacobians."""

from __future__ import annotations

def test_spectral_norm_product_bounds_every_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.LeakyReLU(),
        nn.MaxPool2d(3, 2),
        nn.Sequential(nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(3, 4), nn.GELU()),
        nn.Linear(4, 1),
        nn.Sigmoid(),
    ).eval()
    x = torch.randn(50, 1, 6, 6)
    product = theory.spectral_norm_product(model, x)
    assert product.label == "one-sided"
    assert product.value >= float(local_lipschitz(model, x).max())
    with pytest.raises(ValueError, match="module 1 of the chain, LayerNorm, has no known"):
        theory.spectral_norm_product(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), torch.ones(1, 2))
    with pytest.raises(ValueError, match="module 1 of the chain, BatchNorm1d.*eval"):
        theory.spectral_norm_product(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.ones(1, 2))
    with pytest.raises(ValueError, match="Bilinear|not a chain"):
        theory.spectral_norm_product(nn.Transformer(4, 1, 1, 1), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "maximum"),
    [(2, 2, 6, True), (3, 2, 7, True), (3, 1, 5, False), (2, 2, 6, False), (3, 2, 7, False)],
)
def test_pooling_constants_hold(kernel: int, stride: int, size: int, maximum: bool) -> None:
    pool = (nn.MaxPool1d if maximum else nn.AvgPool1d)(kernel, stride)
    bound = theory.spectral_norm_product(nn.Sequential(pool), torch.ones(1, 1, size)).value
    for seed in range(20):
        x = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(seed))
        jacobian = torch.autograd.functional.jacobian(lambda p: pool(p).flatten(), x).reshape(-1, size)
        assert float(torch.linalg.matrix_norm(jacobian, ord=2)) <= bound * (1 + 1e-6)


