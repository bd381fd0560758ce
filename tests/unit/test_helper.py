from __future__ import annotations

import gc
import threading
import weakref

import pytest

from muco_ds.distributed.helper import Helper


@pytest.fixture
def helper() -> Helper:
    return Helper("test")


def test_nothing_begun_is_over(helper: Helper) -> None:
    assert helper.wait(0) and helper.wait() and helper.error is None


def test_works_beside_and_is_waited_for(helper: Helper) -> None:
    go, seen = threading.Event(), []
    helper.begin(lambda: (go.wait(30), seen.append(threading.current_thread().name)))
    assert not helper.wait(0.05) and seen == []
    go.set()
    assert helper.wait() and seen == ["test"]


def test_one_thread_does_all(helper: Helper) -> None:
    seen: list[int] = []
    before = threading.active_count()
    for _ in range(3):
        helper.begin(lambda: seen.append(threading.get_ident()))
        assert helper.wait(30)
    assert len(set(seen)) == 1 and len(seen) == 3 and threading.active_count() == before


def test_an_error_is_kept_until_the_next_work(helper: Helper) -> None:
    def broken() -> None:
        raise MemoryError("none left")

    helper.begin(broken)
    assert helper.wait(30) and isinstance(helper.error, MemoryError)
    helper.begin(lambda: None)
    assert helper.wait(30) and helper.error is None


def test_begun_twice_is_a_mistake(helper: Helper) -> None:
    go = threading.Event()
    helper.begin(lambda: go.wait(30))
    with pytest.raises(AssertionError, match="begun before"):
        helper.begin(lambda: None)
    go.set()
    assert helper.wait(30)


def test_what_was_done_is_not_held(helper: Helper) -> None:
    class Large:
        pass

    large = Large()
    held = weakref.ref(large)
    helper.begin(lambda large=large: None)
    assert helper.wait(30)
    del large
    gc.collect()
    assert held() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_noticed(helper: Helper) -> None:
    class Dying(BaseException):
        pass

    def dies() -> None:
        helper._working = threading.Lock()  # nobody will release this one
        helper._working.acquire()
        raise Dying

    helper.begin(dies)
    assert helper.wait(30) and isinstance(helper.error, MemoryError) and "'test' ended" in str(helper.error)
