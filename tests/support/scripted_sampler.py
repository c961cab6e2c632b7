"""A sampler as a script: real channel, real weights, real model, everything it does is one awaited call."""

import asyncio
import hashlib
import itertools
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from heterorl.v1 import control_pb2, control_pb2_grpc, rollouts_pb2, rollouts_pb2_grpc, weights_pb2, weights_pb2_grpc
from services.runtime.address import Address
from services.wire.channel import open_channel
from services.wire.convert import (
    encode_group,
    from_lease,
    from_plan,
    from_run_settings,
    from_session,
    from_verdict,
    to_heartbeat,
    to_session,
)
from services.wire.delta import BitTensor, apply_update, root_of
from services.wire.identity import Identity, Role
from services.wire.objects import Chunk, verify_chunk
from services.wire.torch_bits import to_torch
from services.wire.types import (
    Completion,
    FinishReason,
    Lease,
    Plan,
    RunSettings,
    SamplerReport,
    SamplerState,
    ScoredGroup,
    Session,
    UpdateKind,
    Verdict,
)

Reward = Callable[[str, str], float]


class ScriptedSampler:
    """One sampler of id `name`. `reward(answer, completion text)` scores."""

    def __init__(self, address: Address, name: str, folder: Path, reward: Reward) -> None:
        self.name = name
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._reward = reward
        self._channel = open_channel(address, None, "control", Identity(role=Role.SAMPLER, id=name))
        self.control = control_pb2_grpc.ControlServiceStub(self._channel)
        self.weights_stub = weights_pb2_grpc.WeightServiceStub(self._channel)
        self._rollouts = rollouts_pb2_grpc.RolloutServiceStub(self._channel)
        self._seq = itertools.count(1)
        self._spool_id = uuid.uuid4().hex
        self.weights: dict[str, BitTensor] = {}
        self.root = ""
        self.version = 0
        self.bytes_received = 0
        self.plans: list[Plan] = []
        self.lease_ids: list[str] = []
        self.draining = False

    async def close(self) -> None:
        await self._channel.close()

    async def register(self, features: Sequence[str] = ()) -> None:
        response = await self.control.Register(
            control_pb2.RegisterRequest(
                sampler_id=self.name,
                protocol_min=1,
                protocol_max=1,
                features=features,
                spool_id=self._spool_id,
                hostname="test",
            ),
            timeout=20,
        )
        self.session: Session = from_session(response.session)
        self.settings: RunSettings = from_run_settings(response.settings)
        for file in self.settings.model_files:
            (self._folder / file.name).write_bytes(await self.fetch(file.object.object_id))
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self._folder), dtype=torch.bfloat16)
        self._model.eval()

    async def fetch(self, object_id: str, offset: int = 0, length: int = 0) -> bytes:
        """The object's bytes from `offset` on, every chunk checked."""
        data = bytearray()
        request = weights_pb2.FetchObjectRequest(object_id=object_id, offset=offset, length=length)
        async for message in self.weights_stub.FetchObject(request, timeout=20):
            verify_chunk(Chunk(offset=message.offset, data=message.data, crc32c=message.crc32c), offset + len(data))
            data += message.data
        return bytes(data)

    async def plan(self, want: int = 0, have_root: str | None = None, keyframe_only: bool = False) -> Plan:
        request = weights_pb2.GetPlanRequest(
            have_root=self.root if have_root is None else have_root, want_version=want, keyframe_only=keyframe_only
        )
        return from_plan(await self.weights_stub.GetPlan(request, timeout=20))

    async def follow(self) -> Plan:
        """Plan, fetch, verify, load."""
        plan = await self.plan()
        self.plans.append(plan)
        for step in plan.steps:
            parts: list[bytes] = []
            for ref in step.objects:
                data = await self.fetch(ref.object_id)
                assert hashlib.sha256(data).hexdigest() == ref.object_id
                self.bytes_received += len(data)
                parts.append(data)
            base = None if step.kind is UpdateKind.KEYFRAME else self.weights
            self.weights = apply_update(parts, base, expect_root=step.target_root)
            self.root = root_of(self.weights)
        assert self.root == plan.target.decoded.root or not plan.steps
        self.root, self.version = plan.target.decoded.root, plan.target.decoded.version
        missing, unexpected = self._model.load_state_dict(to_torch(self.weights), strict=False)
        self._model.tie_weights()
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        return plan

    async def heartbeat(self, state: SamplerState = SamplerState.GENERATING) -> control_pb2.HeartbeatResponse:
        report = SamplerReport(
            state=SamplerState.DRAINING if self.draining else state,
            policy_version=self.version,
            policy_root=self.root,
            lease_ids=tuple(self.lease_ids),
            weights_bytes_received=self.bytes_received,
        )
        response = await self.control.Heartbeat(to_heartbeat(self.session, report), timeout=20)
        self.draining = self.draining or response.directive == control_pb2.DIRECTIVE_DRAIN
        return response

    async def lease(self, most: int, wait_ms: int = 500) -> list[Lease]:
        response = await self.control.LeasePrompts(
            control_pb2.LeasePromptsRequest(
                session=to_session(self.session), max_leases=most, wait_ms=wait_ms, policy_version=self.version
            ),
            timeout=30,
        )
        leases = [from_lease(lease) for lease in response.leases]
        self.lease_ids += [lease.lease_id for lease in leases]
        return leases

    @torch.no_grad()
    def generate(self, lease: Lease) -> ScoredGroup:
        """Ancestral sampling, one full forward pass per token: slow and plain."""
        text = [{"role": "user", "content": lease.prompt.text}]
        rendered = self._tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
        prompt: list[int] = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        settings = self.settings.eval_sampling if lease.eval_round else self.settings.sampling
        draws = torch.Generator().manual_seed(lease.seed % 2**63)
        completions = [self._complete(prompt, lease, settings.temperature, draws) for _ in range(lease.group_size)]
        return ScoredGroup(
            lease_id=lease.lease_id,
            prompt_id=lease.prompt.prompt_id,
            purpose=lease.purpose,
            policy_version=self.version,
            policy_root=self.root,
            prompt_token_ids=tuple(prompt),
            completions=tuple(completions),
            generation_s=0.1,
            scoring_s=0.01,
            temperature=settings.temperature,
            seed=lease.seed,
            eval_round=lease.eval_round,
        )

    def _complete(self, prompt: list[int], lease: Lease, temperature: float, draws: torch.Generator) -> Completion:
        ids = list(prompt)
        logprobs: list[float] = []
        finish = FinishReason.LENGTH
        for _ in range(self.settings.sampling.max_completion_tokens):
            logits_V = self._model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            log_p_V = torch.log_softmax(logits_V / (temperature or 1.0), -1)
            greedy = temperature == 0
            token = int(log_p_V.argmax() if greedy else torch.multinomial(log_p_V.exp(), 1, generator=draws))
            ids.append(token)
            logprobs.append(min(0.0, float(log_p_V[token])))
            if token == self._tokenizer.eos_token_id:
                finish = FinishReason.STOP
                break
        text = self._tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        return Completion(
            token_ids=tuple(ids[len(prompt) :]),
            sampler_logprobs=tuple(logprobs),
            reward=self._reward(lease.prompt.answer, text),
            finish_reason=finish,
        )

    async def submit(self, groups: list[ScoredGroup]) -> list[Verdict]:
        """One stream: Hello, the groups, their verdicts."""
        call = self._rollouts.SubmitGroups(timeout=30)
        await call.write(
            rollouts_pb2.SubmitGroupsRequest(
                hello=rollouts_pb2.SubmitHello(session=to_session(self.session), spool_id=self._spool_id, first_seq=1)
            )
        )
        welcome = await call.read()
        assert welcome.HasField("welcome"), welcome
        for group in groups:
            payload = encode_group(group)
            envelope = rollouts_pb2.GroupEnvelope(
                seq=next(self._seq),
                group_id=str(uuid.uuid4()),
                content_sha256=hashlib.sha256(payload).digest(),
                payload=payload,
            )
            await call.write(rollouts_pb2.SubmitGroupsRequest(group=envelope))
        verdicts: list[Verdict] = []
        while len(verdicts) < len(groups):
            message = await call.read()
            assert message.HasField("ack"), message
            verdicts += [from_verdict(verdict) for verdict in message.ack.verdicts]
        await call.done_writing()
        call.cancel()
        done = {group.lease_id for group in groups}
        self.lease_ids = [lease for lease in self.lease_ids if lease not in done]
        return verdicts

    async def work(self) -> None:
        """Until drained: heartbeat, follow, lease, generate, submit."""
        while not self.draining:
            await self.follow()
            await self.heartbeat()
            leases = await self.lease(4)
            groups = [await asyncio.to_thread(self.generate, lease) for lease in leases]
            if groups:
                await self.submit(groups)
        await self.heartbeat()


async def dial(address: str, name: str, folder: Path, reward: Reward) -> ScriptedSampler:
    """A registered sampler whose model files lie in `folder`."""
    host, _, port = address.rpartition(":")
    sampler = ScriptedSampler(Address(host=host, port=int(port)), name, folder, reward)
    await sampler.register()
    return sampler
