"""`make mutants` is run now and then: that each mutant still finds its place is seen here, at every change of the sources."""

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_has_one_place(mutant: Mutant) -> None:
    assert (ROOT / "src/tpfuse" / mutant.file).read_text().count(mutant.old) == 1
