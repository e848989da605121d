from specforge.config.launch import RestartOptions
from specforge.launch.restarts import Restarts


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_doubles_with_each_death_up_to_the_longest():
    restarts = Restarts(RestartOptions(max_restarts=8, first_backoff_s=0.5, longest_backoff_s=6.0), Clock())
    delays = []
    for _ in range(6):
        restarts.started()
        delays.append(restarts.died())
    assert delays == [0.5, 1.0, 2.0, 4.0, 6.0, 6.0]


def test_a_process_is_given_up_at_the_first_death_after_its_last_restart():
    restarts = Restarts(RestartOptions(max_restarts=2), Clock())
    delays = []
    for _ in range(3):
        restarts.started()
        delays.append(restarts.died())
    assert delays == [0.5, 1.0, None]
    assert restarts.num_deaths == 3


def test_a_process_that_lived_long_enough_begins_a_new_row_of_deaths():
    clock = Clock()
    restarts = Restarts(RestartOptions(max_restarts=2, healthy_after_s=120.0), clock)
    for lived_s, delay_s in ((1.0, 0.5), (119.0, 1.0), (120.0, 0.5), (1.0, 1.0), (1.0, None)):
        restarts.started()
        clock.now += lived_s
        assert restarts.died() == delay_s


def test_no_restart_is_an_option():
    restarts = Restarts(RestartOptions(max_restarts=0), Clock())
    restarts.started()
    assert restarts.died() is None


def test_a_long_row_of_deaths_keeps_the_longest_wait():
    restarts = Restarts(RestartOptions(max_restarts=5000), Clock())
    restarts.started()
    delays = [restarts.died() for _ in range(5000)]
    assert delays[-1] == 30.0


def test_who_goes_over_the_same_ground_again_is_given_up_however_long_it_lived():
    clock, step = Clock(), 30
    restarts = Restarts(RestartOptions(max_restarts=2, healthy_after_s=120.0), clock, lambda: step)
    delays = []
    for at_death in (30, 40, 40, 40):
        restarts.started()
        clock.now += 500.0
        step = at_death
        delays.append(restarts.died())
    assert delays == [0.5, 0.5, 1.0, None]


def test_a_short_life_continues_the_row_whatever_it_reached():
    steps = iter([0, 10, 20, 30])
    restarts = Restarts(RestartOptions(max_restarts=2, healthy_after_s=120.0), Clock(), lambda: next(steps))
    delays = []
    for _ in range(3):
        restarts.started()
        delays.append(restarts.died())
    assert delays == [0.5, 1.0, None]
