"""FP8 sums of Hopper's tensor cores: what an H200 gave (tl.dot of e4m3 codes, Triton 3.6), to the
bit.
"""

from __future__ import annotations

import pytest
import torch

from verify.bounds.exact import from_keys
from verify.oracles.formats import Nearest

SEEN = {
    "both signs": (
        [
            (
                "dac04850c5cacc465bd9cbcedec84d52cf53e1d2d5d937cfd1564e52d34e5552565dd34b55d4d94e4e435ad6e0d8db544b52"
                "40c744da5852d6594b45cfd34ed5"
            ),
            (
                "53d15859dddcbe5cb860d9d55c9e34d13ddbca51cfda50cedd5cbf5244d3d3db585dbc59ddcbd4b5d847e05161515a59ce4a"
                "5849534c49cd3ac43ae1d3cf56c2"
            ),
            (
                "d0ccd8c24bd7d6535d40dfd92d44d5cf5d54544f4b524b48cd5edad8d2d05bd8bcd0d3d9d7ca2554acd055e0ca4bcb57d051"
                "cec2d4a15561d15a5559505ee24c"
            ),
            (
                "53604ed8dc2dd15a58a6c2c1d556d05957555a605863d2cc49e0d5bc5dd45acddfcbc4de48da4f5bc14bba5534d95edc54d7"
                "4fe153d4d1d2c14dc0d9dd61dd25"
            ),
        ],
        [
            (
                "4d5cbd3953b752c0c8b84a4c60523b57584ebfd8d1d252cb5755424c62dadb4bc350494e56524b5947d2e140bd5cd762ca5c"
                "d8515059d0e1d5ce8849df56d93d"
            ),
            (
                "52d2cecb5758465cd7d0d041d83f52dfdf4cd5dbda51d25cd359d054dc53dcd25244dc2f52d9d04e4e60d0d842da2f5ed0d4"
                "50d45ab7da51d5e0c5c7cc4ece5a"
            ),
            (
                "ab59565255c8443142d0534db1ce5b603a42c04b61d8cd85d94e5ed6575ee04ad75bd05743cdd7d761dac758275e4958d8cd"
                "4ddbc6bbc9b74352d9d7d45858e0"
            ),
            (
                "dd5cdb4e4dd952ded3b250d942525a9dc1545b5c52d653d3ca415d4ae0da5dc3e0cfc050ccd9d258595051bc58615acd44d4"
                "51555d5852de5264d8c55660534f"
            ),
        ],
        [
            [-2051.0, 1732.5, 1159.0, -1368.5],
            [2098.25, 1071.375, 1458.625, 156.1875],
            [-1284.625, -277.0, -3656.0, 1034.75],
            [-734.625, -2411.5, -156.6875, 1961.125],
        ],
    ),
    "one sign": (
        [
            (
                "585d1e5b5b5250574a584257395d55455a324354524e5159594858514b4e3d315d4758516046444f454043575b4a52583d60"
                "5a4c5b4c5d495d465b585b5b3b4e5e4d56575016554c4d56545a5c4243445a46535d4953323a5a4a435b424e4f4f4856595c"
                "5059524b5245435059564d554b535b545c5250225e5a6251485a503e"
            ),
            (
                "405554574c5c4b5a49585650554d574c53455d515556504d505353545751305c3631531b2e5442535926525559355a545e5c"
                "60583b6044514f60553d55435d6152534f4a475953565642475b565b4d5051424a616140195c595f4d6061515952314d5545"
                "535d5a4c352d535149495a4c5d555556604c6049604c4a62464f5c58"
            ),
            (
                "5a4252585e4652505d525c515860535d5d514e505a3649395a5944423d425e574b3958625855553d544e4f525c4d49604057"
                "4a3b535b5053565162592354495a595e425954625a53585952625b190a155659405e5141504b5848535c514b604a595b4e60"
                "51535958515853555519475a5e535a534c5240525c61544a55434b4c"
            ),
        ],
        [
            (
                "59505930552c51505d4e53504d525c5b35565656505e413d5a3d4c5943553f5e5a4a523a505b53555a54525c515c4a515f52"
                "5e5956455b4b5752512d5e284f485553525c55464758366645595c4a504a5159614c5e5c52585456554c525f4347495f4e53"
                "49515f60312d615b4a5b4139494b5f524d505d554858505a44604b48"
            ),
            (
                "584b605c535a59584c442e505455645f585a59584b535a513c535a505959595d51435252505757514a6254525e554245564a"
                "49574c385955584f505b585c595e3c4163445e4b4d533f5b5827595859385c515d564e5436595d5d355262614d59494d5342"
                "395f6039604c444d57585b57485b514d564c495e60515947595f5451"
            ),
            (
                "4c5b475a566142595c4a4b514c4b4b504b514a44573b5259504b5557485a583958463c544b465b485b4c3d594b5a4b594341"
                "515a565c5844585d394f505c3b575f5c4f525b48585359615b52575351395b5e585f5e6154585842455759604b5a504a5a4c"
                "59384e5d4a44415f4f58575251545944604a5152605c566047565e49"
            ),
        ],
        [[18870.0, 20802.0, 21084.0], [20644.0, 23362.0, 22856.0], [20110.0, 21268.0, 21884.0]],
    ),
}
"""(codes of the left rows, of the right columns, the sums)"""


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[n,K] and [m,K] -> [n,m]"""
    return Nearest().product(from_keys, a[None, None, None], b.T[None, None], "fp22", cut=True)[
        0, 0, 0
    ]


def codes(rows: list[str]) -> torch.Tensor:
    return (
        torch.tensor([list(bytes.fromhex(row)) for row in rows], dtype=torch.uint8)
        .view(torch.float8_e4m3fn)
        .double()
    )


@pytest.mark.parametrize("name", SEEN)
def test_the_emulation_gives_what_the_hardware_gave(name: str) -> None:
    left, right, sums = SEEN[name]
    assert product(codes(left), codes(right)).tolist() == sums


@pytest.mark.parametrize(("power", "kept"), [(12, 1.0), (13, 1.0), (14, 0.0), (15, 0.0)])
@pytest.mark.parametrize("many", [1, 8, 31])
def test_what_is_small_beside_the_accumulator_is_lost_product_by_product(
    power: int, kept: float, many: int
) -> None:
    """1 in a first instruction, then `many` products of 2^-power: on the H200 those of 2^-14 left
    no trace, however many.
    """
    a, b = torch.zeros(1, 64), torch.zeros(1, 64)
    a[0, 0] = b[0, 0] = 1.0
    a[0, 32 : 32 + many], b[0, 32 : 32 + many] = 2.0 ** -(power // 2), 2.0 ** -(power - power // 2)
    assert product(a, b).item() == 1.0 + kept * many * 2.0**-power
