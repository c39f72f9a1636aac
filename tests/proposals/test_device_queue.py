"""The device queue, with real threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from progidiff.errors import BusyError, CancelledError, NotFoundError, RequestError
from progidiff.proposals.device_queue import Asker, DeviceQueue, Job, JobState


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


class Worker:
    """A thread that holds the device until it is released."""

    def __init__(
        self,
        queue: DeviceQueue,
        image: str,
        order: list[str] | None = None,
        job_id: str | None = None,
        asker: Asker = Asker(),  # noqa: B008 - it is frozen
    ) -> None:
        self.release = threading.Event()
        self.error: BaseException | None = None
        self.order = order
        self.args = (queue, image, job_id, asker)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        queue, image, job_id, asker = self.args
        try:
            with queue.job("infer", image, job_id, asker):
                if self.order is not None:
                    self.order.append(image)
                self.release.wait(10)
        except BaseException as err:
            self.error = err

    def finish(self) -> None:
        self.release.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


def only_job(queue: DeviceQueue, image: str) -> Job:
    wait_until(lambda: len(queue.list(image)) == 1)
    return queue.list(image)[0]


def test_jobs_run_one_at_a_time_in_the_order_they_came():
    queue, order = DeviceQueue("cpu"), []
    workers = []
    for name in "abcd":
        workers.append(Worker(queue, name, order))
        only_job(queue, name)
    wait_until(lambda: order == ["a"])
    assert [only_job(queue, name).position for name in "abcd"] == [0, 1, 2, 3]
    assert only_job(queue, "b").state is JobState.QUEUED
    for worker in workers:
        worker.finish()
    assert order == ["a", "b", "c", "d"]
    assert {job.state for job in queue.list()} == {JobState.DONE}


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    queue = DeviceQueue("cpu", max_waiting=1)
    first = Worker(queue, "a")
    only_job(queue, "a")
    second = Worker(queue, "b")
    only_job(queue, "b")
    with pytest.raises(BusyError, match="Try again in about") as caught, queue.job("infer", "c"):
        pass
    assert caught.value.retry_after >= 1
    assert caught.value.status == 503
    first.finish()
    second.finish()
    with queue.job("infer", "c") as job:
        assert job.position == 0


def test_a_waiting_job_that_is_cancelled_leaves_the_queue_at_once():
    queue = DeviceQueue("cpu")
    first, second = Worker(queue, "a"), None
    only_job(queue, "a")
    second = Worker(queue, "b")
    third = Worker(queue, "c")
    only_job(queue, "c")
    only_job(queue, "b").cancel()
    second.thread.join(5)
    assert isinstance(second.error, CancelledError)
    assert only_job(queue, "b").state is JobState.CANCELLED
    assert only_job(queue, "c").position == 1
    first.finish()
    third.finish()
    assert third.error is None


def test_a_running_job_learns_that_it_is_cancelled_and_hands_the_device_on():
    queue = DeviceQueue("cpu")
    with pytest.raises(CancelledError, match="stopped"), queue.job("infer", "a") as job:
        assert not job.cancelled()
        queue.get(job.id).cancel()
        assert job.cancelled()
        raise CancelledError("stopped after slice 3")
    assert job.info().state == "cancelled"
    assert job.info().reason == "stopped after slice 3"
    with queue.job("infer", "b") as after:
        assert after.state is JobState.RUNNING


def test_a_job_cancelled_in_the_moment_of_its_turn_does_not_block_the_device():
    queue = DeviceQueue("cpu")
    first = Worker(queue, "a")
    only_job(queue, "a")
    second = Worker(queue, "b")
    job = only_job(queue, "b")
    first.release.set()
    job.cancel()
    second.finish()
    with queue.job("infer", "c"):
        assert queue.list("c")[0].state is JobState.RUNNING


def test_a_failed_job_keeps_its_reason_and_frees_the_device():
    queue = DeviceQueue("cpu")
    with pytest.raises(ValueError, match="broken"), queue.job("infer", "a") as job:
        raise ValueError("broken image")
    assert (job.state, job.reason) == (JobState.FAILED, "broken image")
    with queue.job("infer", "a"):
        pass


def test_progress_is_told_as_percent_and_slices():
    queue = DeviceQueue("cpu")
    with queue.job("infer", "a") as job:
        assert job.info().percent == 0
        job.progress(30, 120)
        info = job.info()
        assert (info.percent, info.slices_done, info.slices_total, info.state) == (25, 30, 120, "running")
        job.progress(500, 120)
        assert job.info().slices_done == 120
    assert job.info().percent == 100


def test_old_jobs_are_forgotten_and_asking_for_one_says_so():
    queue = DeviceQueue("cpu", keep=3)
    for index in range(6):
        with queue.job("infer", f"image-{index}", job_id=f"job-{index}"):
            pass
    assert [job.id for job in queue.list()] == ["job-5", "job-4", "job-3"]
    with pytest.raises(NotFoundError, match="no job 'job-0'"):
        queue.get("job-0")


def test_a_job_id_of_an_unfinished_job_is_refused():
    queue = DeviceQueue("cpu")
    worker = Worker(queue, "a", job_id="mine")
    only_job(queue, "a")
    with pytest.raises(RequestError, match="still running|still queued"), queue.job("infer", "b", job_id="mine"):
        pass
    worker.finish()
    with queue.job("infer", "b", job_id="mine") as job:
        assert queue.get("mine") is job


@pytest.mark.parametrize("job_id", ["", "../x", "a b", "x" * 65])
def test_a_malformed_job_id_is_refused(job_id: str):
    with pytest.raises(RequestError, match="1 to 64 letters"), DeviceQueue("cpu").job("infer", "a", job_id=job_id):
        pass


def test_many_threads_never_hold_the_device_together():
    queue = DeviceQueue("cpu", max_waiting=64)
    inside, most, done = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        with queue.job("infer", "a"):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.001)
            with guard:
                inside -= 1
                done += 1

    threads = [threading.Thread(target=work) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (most, done) == (1, 24)


def test_a_closed_queue_cancels_what_runs_and_waits_and_takes_no_more():
    queue = DeviceQueue("cpu")
    running, waiting = Worker(queue, "a"), None
    job = only_job(queue, "a")
    wait_until(lambda: job.state is JobState.RUNNING)
    waiting = Worker(queue, "b")
    only_job(queue, "b")
    queue.close()
    waiting.thread.join(10)
    assert isinstance(waiting.error, CancelledError)
    assert job.cancelled()
    with pytest.raises(BusyError, match="is stopping"), queue.job("infer", "c"):
        pass
    running.finish()


class BackgroundWorker(Worker):
    """A thread that holds the device in the background until somebody wants it."""

    def _run(self) -> None:
        queue, image, *_ = self.args
        try:
            with queue.background_job("score", image) as job:
                if self.order is not None:
                    self.order.append(image)
                while not self.release.is_set():
                    if job.cancelled():
                        raise CancelledError("a request came")
                    time.sleep(0.002)
        except BaseException as err:
            self.error = err


def test_a_request_cancels_background_work_and_goes_next_whatever_the_limit():
    queue, order = DeviceQueue("cpu", max_waiting=0), []
    background = BackgroundWorker(queue, "pool", order)
    wait_until(lambda: order == ["pool"])
    assert queue.list() == []
    request = Worker(queue, "user", order)
    wait_until(lambda: order == ["pool", "user"])
    background.thread.join(10)
    assert isinstance(background.error, CancelledError)
    with pytest.raises(BusyError, match="already wait"), queue.job("infer", "another"):
        pass
    request.finish()
    assert request.error is None
    assert queue.is_idle()


def test_background_work_starts_only_while_the_device_is_idle_and_not_after_the_end():
    queue = DeviceQueue("cpu")
    request = Worker(queue, "user")
    only_job(queue, "user")
    with pytest.raises(BusyError, match="not idle"), queue.background_job("score", "pool"):
        pass
    request.finish()
    with queue.background_job("score", "pool") as job:
        assert job.state is JobState.RUNNING
        assert not queue.is_idle()
    assert queue.is_idle()
    background = BackgroundWorker(queue, "pool")
    wait_until(lambda: not queue.is_idle())
    queue.close()
    background.thread.join(10)
    assert isinstance(background.error, CancelledError)
    with pytest.raises(BusyError), queue.background_job("score", "pool"):
        pass


def test_whoever_shares_the_device_hears_when_requests_want_it_and_when_they_have_had_it():
    queue = DeviceQueue("cpu")
    heard: list[bool] = []
    queue.on_demand.append(heard.append)
    with queue.background_job("score", "a"):
        assert heard == []
    first, second = Worker(queue, "a"), Worker(queue, "b")
    wait_until(lambda: len(queue.list()) == 2)
    assert heard == [True]
    first.release.set()
    second.release.set()
    wait_until(lambda: all(job.state is JobState.DONE for job in queue.list()))
    assert heard == [True, False]


def line_up(queue: DeviceQueue, names: list[str], order: list[str]) -> list[Worker]:
    """A worker per name, in this order; "anna 2" is the second request of anna."""
    workers = []
    for name in names:
        workers.append(Worker(queue, name, order, asker=Asker(name.split()[0])))
        only_job(queue, name)
    return workers


def finish_in_turn(workers: list[Worker], order: list[str]) -> None:
    """Let everybody compute as soon as it is his turn."""
    for worker in workers:
        worker.release.set()
    for worker in workers:
        worker.finish()
    assert len(order) == len(workers)


def test_turns_go_round_the_users_and_one_users_requests_are_served_as_they_came():
    queue, order = DeviceQueue("cpu"), []
    names = ["anna 1", "anna 2", "anna 3", "anna 4", "ben 1", "ben 2", "carl 1"]
    workers = line_up(queue, names, order)
    expected = ["anna 1", "ben 1", "carl 1", "anna 2", "ben 2", "anna 3", "anna 4"]
    assert sorted(names, key=lambda name: only_job(queue, name).position) == expected
    assert only_job(queue, "carl 1").info().waiting_for == "2 requests before it"
    assert only_job(queue, "ben 1").info().waiting_for == "1 request before it"
    assert only_job(queue, "anna 1").info().waiting_for == ""
    finish_in_turn(workers, order)
    assert order == expected


def test_a_polite_user_is_next_behind_fourteen_greedy_connections():
    queue, order = DeviceQueue("cpu", max_waiting=8), []
    greedy = line_up(queue, [f"greedy {number}" for number in range(9)], order)
    for _ in range(5):  # Nine are in, the others are sent away, and come again and again.
        with pytest.raises(BusyError, match="already wait"), queue.job("infer", "x", asker=Asker("greedy")):
            pass
    polite = line_up(queue, ["polite 1"], order)
    assert only_job(queue, "polite 1").position == 1
    greedy[-1].thread.join(10)
    assert isinstance(greedy[-1].error, BusyError)
    assert "more than their share" in str(greedy[-1].error)
    assert only_job(queue, "greedy 8").state is JobState.FAILED
    finish_in_turn([*greedy[:-1], *polite], order)
    assert order[:3] == ["greedy 0", "polite 1", "greedy 1"]


def test_places_are_shared_and_nobody_is_sent_away_for_somebody_who_holds_as_many():
    queue, order = DeviceQueue("cpu", max_waiting=3), []
    workers = line_up(queue, ["anna 1", "anna 2", "anna 3", "anna 4", "ben 1", "ben 2"], order)

    def waiting() -> list[str]:
        return sorted(job.image for job in queue.list() if job.position)

    assert waiting() == ["anna 2", "ben 1", "ben 2"]  # Anna computes too: each holds two.
    for name in ("anna", "ben"):
        with pytest.raises(BusyError, match="already wait"), queue.job("infer", "x", asker=Asker(name)):
            pass
    workers += line_up(queue, ["carl 1"], order)
    assert waiting() == ["ben 1", "ben 2", "carl 1"]
    for displaced in ("anna 2", "anna 3", "anna 4"):
        wait_until(lambda name=displaced: only_job(queue, name).state is JobState.FAILED)  # type: ignore[misc]
    finish_in_turn([worker for worker in workers if worker.error is None], order)
    assert order == ["anna 1", "ben 1", "carl 1", "ben 2"]


def test_a_client_that_went_away_gives_its_place_up_while_it_waits_and_while_it_computes():
    queue, order = DeviceQueue("cpu"), []
    gone = threading.Event()
    first = Worker(queue, "first", order)
    only_job(queue, "first")
    second = Worker(queue, "second", order, asker=Asker("anna", gone.is_set))
    third = Worker(queue, "third", order)
    only_job(queue, "third")
    gone.set()
    second.thread.join(5)
    assert isinstance(second.error, CancelledError)
    assert "went away while it waited" in str(second.error)
    assert only_job(queue, "third").position == 1
    finish_in_turn([first, third], order)
    gone.clear()
    with queue.job("infer", "fourth", asker=Asker("anna", gone.is_set)) as job:
        assert not job.cancelled()
        gone.set()
        wait_until(job.cancelled)


def test_a_person_waits_for_one_batch_of_the_background_at_most_and_is_told_what_for():
    queue, order = DeviceQueue("cpu"), []
    batches: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def score() -> None:
        with pytest.raises(CancelledError), queue.background_job("score", "pool") as job:
            for number in range(100):
                if job.cancelled():
                    raise CancelledError("made way")
                batches.append(f"batch {number}")
                if number == 2:
                    entered.set()
                    assert leave.wait(10)

    background = threading.Thread(target=score)
    background.start()
    assert entered.wait(10)
    person = Worker(queue, "person", order, asker=Asker("anna"))
    info = only_job(queue, "person").info()
    assert (info.state, info.position) == (JobState.QUEUED, 1)
    assert info.waiting_for == "the background scoring of 'pool', which makes way after the slices it is at"
    other = Worker(queue, "other", order, asker=Asker("ben"))
    assert only_job(queue, "other").info().waiting_for == "1 request before it"
    leave.set()
    background.join(10)
    finish_in_turn([person, other], order)
    assert batches == ["batch 0", "batch 1", "batch 2"]
    assert order == ["person", "other"]


def test_several_devices_compute_side_by_side_and_whoever_is_next_gets_the_one_that_is_free_first():
    queue, order = DeviceQueue(["cuda:0", "cuda:1"]), []
    workers = {}
    for name in "abcd":
        workers[name] = Worker(queue, name, order)
        only_job(queue, name)
    wait_until(lambda: sorted(order) == ["a", "b"])
    assert [only_job(queue, name).info().device for name in "ab"] == ["cuda:0", "cuda:1"]
    assert [only_job(queue, name).position for name in "cd"] == [1, 2]
    assert only_job(queue, "d").info().device == "cuda:0 or cuda:1"
    assert not queue.is_idle()
    workers["b"].finish()
    wait_until(lambda: "c" in order)
    assert only_job(queue, "c").info().device == "cuda:1"
    for name in "acd":
        workers[name].finish()
    assert queue.is_idle()
    assert {job.state for job in queue.list()} == {JobState.DONE}
    assert only_job(queue, "d").info().waiting_for == ""


def test_a_request_goes_to_the_idle_device_that_knows_its_image_or_to_the_one_idle_longest():
    queue = DeviceQueue(["first", "second"])
    for image, device in (("a", "first"), ("b", "second"), ("b", "second"), ("c", "first"), ("b", "second")):
        with queue.job("infer", image) as job:
            assert (image, job.device) == (image, device)


def test_background_work_takes_every_idle_device_and_one_request_stops_one_of_it():
    queue = DeviceQueue(["first", "second"])
    with queue.background_job("score", "a") as a, queue.background_job("score", "b") as b:
        assert (a.device, b.device) == ("first", "second")
        with pytest.raises(BusyError, match="first or second is not idle"), queue.background_job("score", "c"):
            pass
        worker = Worker(queue, "d")
        assert only_job(queue, "d").info().waiting_for.startswith("the background scoring of 'a'")
        wait_until(a.cancelled)
        assert not b.cancelled()
        other = Worker(queue, "e")
        only_job(queue, "e")
        wait_until(b.cancelled)
    wait_until(lambda: {job.state for job in queue.list()} == {JobState.RUNNING})
    worker.finish()
    other.finish()


def test_an_idle_device_takes_the_request_and_the_scoring_on_the_other_one_goes_on():
    queue, demands = DeviceQueue(["first", "second"]), []
    queue.on_demand.append(demands.append)
    with queue.background_job("score", "a") as scoring:
        with queue.job("infer", "b") as job:
            assert job.device == "second"
            assert demands == [True]
        assert not scoring.cancelled()
    assert demands == [True, False]
