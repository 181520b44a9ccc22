"""
The tasks of robomimic's datasets as Gymnasium environments, made from the description that the datasets carry.

robosuite is created directly with that description, as robomimic's own ``EnvRobosuite`` does it: importing that class
would need ``mujoco_py`` and, to render, ``egl_probe``, neither of which is used.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from modip_sb3.datasets.files import open_hdf5
from modip_sb3.datasets.robomimic import default_obs_keys

INSTALL = 'pip install "modip-sb3[robomimic]" && pip install --no-deps robosuite==1.4.1'
ROBOSUITE_TYPE = 1  # robomimic's EnvType.ROBOSUITE_TYPE

_OSC_POSE = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],  # metres and radians in one step
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "control_delta": True,
    "interpolation": None,
    "ramp_ratio": 0.2,
}


def benchmark_env_args(env_name: str, robots: Sequence[str] = ("Panda",), **env_kwargs: Any) -> dict[str, Any]:
    """
    What robomimic's own datasets say of their environments.

    :param env_name: robosuite's name of the task, such as "Lift"
    :param robots: names of the robots
    :param env_kwargs: further arguments of robosuite's environment
    :return: the ``env_args`` of a dataset
    """
    common: dict[str, Any] = {
        "robots": list(robots),
        "controller_configs": _OSC_POSE,
        "control_freq": 20,
        "reward_shaping": False,
    }
    return {
        "env_name": env_name,
        "env_version": "1.4.1",
        "type": ROBOSUITE_TYPE,
        "env_kwargs": common | env_kwargs,
    }


def read_env_args(source: Mapping[str, Any] | str | PathLike[str]) -> dict[str, Any]:
    """
    :param source: ``env_args`` as they are, the path of a JSON file of them, or of a robomimic dataset
    :return: the ``env_args``
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if they are not there, or describe no environment of robosuite
    """
    if isinstance(source, Mapping):
        name, text = "env_args", json.dumps(dict(source))
    elif (path := Path(source).expanduser()).suffix == ".json":
        name, text = f"env_args in {path}", path.read_text()
    else:
        with open_hdf5(path) as file:
            name, text = f"env_args in {path}", file["data"].attrs.get("env_args", "{}") if "data" in file else "{}"
    env_args = json.loads(text)
    if missing := {"env_name", "env_kwargs"} - env_args.keys():
        raise ValueError(f"{name} lack {sorted(missing)}, found {sorted(env_args)}; use those of a robomimic dataset.")
    if env_args.get("type", ROBOSUITE_TYPE) != ROBOSUITE_TYPE:
        raise ValueError(
            f"{name} have type {env_args['type']}, expected {ROBOSUITE_TYPE}, robomimic's number for robosuite; "
            "make other environments with gymnasium.make."
        )
    return env_args


class RobomimicEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A task of robosuite with the low-dimensional observations of robomimic's datasets, and success as reward.

    Every observation is a function of the simulator's state alone, as in datasets whose observations were extracted
    from stored states. ``gymnasium.make`` adds the time limit.

    :param env_args: description of the environment: a mapping, or the path of a JSON file or of a robomimic dataset
    :param obs_keys: low-dimensional observations in the order of the vector; by default those that ``OfflineDataset``
        reads from robomimic's datasets
    :param terminate_on_success: end the episode with the first success; otherwise every successful step is rewarded
    :param render_mode: None or "rgb_array"
    :param camera: robosuite's name of the camera that renders
    :param image_size: height and width of rendered images, in pixels
    :raises ImportError: if robosuite is not installed
    :raises ValueError: if the description or an observation is unknown
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        env_args: Mapping[str, Any] | str | PathLike[str],
        obs_keys: Sequence[str] | None = None,
        terminate_on_success: bool = True,
        render_mode: str | None = None,
        camera: str = "agentview",
        image_size: tuple[int, int] = (256, 256),
    ):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r} is unknown; choose from {self.metadata['render_modes']}.")
        self.env_args = read_env_args(env_args)
        self.terminate_on_success, self.render_mode = terminate_on_success, render_mode
        self.camera, self.image_size = camera, image_size
        kwargs = self.env_args["env_kwargs"] | {
            "has_renderer": False,
            "has_offscreen_renderer": False,  # robosuite makes it at every reset, render() when it is needed
            "ignore_done": True,
            "use_object_obs": True,
            "use_camera_obs": False,
        }
        with _numpy_seed(0):
            self.robosuite_env = _import_robosuite().make(self.env_args["env_name"], **kwargs)
        self.metadata = {**self.metadata, "render_fps": self.robosuite_env.control_freq}
        self.obs_keys = self._activate(obs_keys)
        self.obs_sizes = {key: values.size for key, values in self._observe_by_key().items()}
        low, high = self.robosuite_env.action_spec
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))
        self.observation_space = spaces.Box(-np.inf, np.inf, (sum(self.obs_sizes.values()),), np.float32)

    def _activate(self, obs_keys: Sequence[str] | None) -> list[str]:
        known = {"object", *self.robosuite_env.observation_names}
        if obs_keys is None:
            return default_obs_keys(known)
        if (unknown := [key for key in obs_keys if key not in known]) or not obs_keys:
            raise ValueError(
                f"obs_keys={list(obs_keys)} names {unknown or 'nothing'}, expected some of {sorted(known)}."
            )
        for key in set(obs_keys) - {"object"}:
            self.robosuite_env.modify_observable(key, "active", True)
        return list(obs_keys)

    def _observe_by_key(self) -> dict[str, np.ndarray]:
        found = self.robosuite_env._get_observations(force_update=True)
        found["object"] = found["object-state"]
        return {key: np.asarray(found[key], np.float32).reshape(-1) for key in self.obs_keys}

    def observe(self) -> np.ndarray:
        """The observation of the present simulator state."""
        return np.concatenate(list(self._observe_by_key().values()))

    def split(self, observations: np.ndarray) -> dict[str, np.ndarray]:
        """
        :param observations: ``(..., n)`` vectors of this environment
        :return: their parts by robomimic's keys
        """
        edges = np.cumsum(list(self.obs_sizes.values()))[:-1]
        return dict(zip(self.obs_keys, np.split(observations, edges, axis=-1), strict=True))

    @property
    def simulator_state(self) -> np.ndarray:
        """Time, positions and velocities of the simulator in one vector, as robomimic stores them."""
        return np.array(self.robosuite_env.sim.get_state().flatten())

    @simulator_state.setter
    def simulator_state(self, state: np.ndarray) -> None:
        if np.shape(state) != (expected := self.simulator_state.shape):
            raise ValueError(
                f"The simulator state has shape {np.shape(state)}, expected {expected} for "
                f"{self.env_args['env_name']}; use states of this task."
            )
        sim = self.robosuite_env.sim
        sim.set_state_from_flattened(np.asarray(state, np.float64))
        sim.forward()
        for robot in self.robosuite_env.robots:  # they hold their pose until told otherwise
            robot.controller.update(force=True)
            robot.controller.update_initial_joints(robot._joint_positions)

    @property
    def model_xml(self) -> str:
        """The simulator's model, in which robosuite draws some sizes anew at every reset."""
        return self.robosuite_env.sim.model.get_xml()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :param seed: of all that is drawn at this reset and the following
        :param options: "state", a flat simulator state to start from, and "model", the XML it belongs to
        :return: the first observation, and an empty dict
        :raises ValueError: if the options are unknown, or the state is of another model
        """
        super().reset(seed=seed)
        options = options or {}
        if unknown := options.keys() - {"state", "model"}:
            raise ValueError(f"The options {sorted(unknown)} of reset are unknown, expected 'state' and 'model'.")
        with _numpy_seed(int(self.np_random.integers(2**32))):
            self.robosuite_env.reset()
            if "model" in options:
                self.robosuite_env.reset_from_xml_string(self.robosuite_env.edit_model_xml(options["model"]))
        if "state" in options:
            self.simulator_state = options["state"]
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.robosuite_env.step(np.asarray(action, np.float64))
        self.robosuite_env.sim.forward()  # robosuite observes one simulation step (2 ms) late
        success = bool(self.robosuite_env._check_success())
        return self.observe(), float(success), success and self.terminate_on_success, False, {"is_success": success}

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            gym.logger.warn('render() was called without render_mode; pass render_mode="rgb_array".')
            return None
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        sim, (height, width) = self.robosuite_env.sim, self.image_size
        if sim._render_context_offscreen is None:
            context = MjRenderContextOffscreen(sim, device_id=-1)  # the simulator keeps it
            context.vopt.geomgroup[0] = 0  # what collides, in the way of what is to be seen
        return sim.render(height=height, width=width, camera_name=self.camera)[::-1]

    def close(self) -> None:
        self.robosuite_env.close()


def _import_robosuite() -> ModuleType:
    logging.getLogger("robosuite_logs").addFilter(_says_more_than_macros)
    try:
        import robosuite
    except ImportError as error:
        raise ImportError(f"robosuite cannot be imported ({error}): run {INSTALL}.") from error
    return robosuite


def _says_more_than_macros(record: logging.LogRecord) -> bool:
    return record.filename != "macros.py"  # three lines in each process on a file that nobody needs


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """robosuite draws from numpy's global generator: seed it within, and put it back."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
