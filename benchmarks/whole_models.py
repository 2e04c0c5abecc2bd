"""Models with recurrent layers as people write them, for ``models.py``: small versions of known designs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Tagger(nn.Module):
    """A bidirectional LSTM that tags the words of sentences, which are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5000, 100)
        self.lstm = nn.LSTM(100, 128, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(256, 17)
        words = torch.randint(1, 60, (32,))
        words[0] = 60
        self.inputs = torch.randint(0, 5000, (32, 60)), words

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Return a score for each tag of each word, ``(sentences, words, tags)``."""
        packed = pack_padded_sequence(self.embed(words), lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


class Forecaster(nn.Module):
    """Reads a week of hours in one call, and forecasts a day, hour by hour, from its own results: DeepAR."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 40, 3)
        self.head = nn.Linear(40, 2)
        self.inputs = (torch.randn(168, 64, 5), torch.randn(24, 64, 4))

    def forward(self, past: Tensor, covariates: Tensor) -> Tensor:
        """Return mean and scale of each hour, ``(hours, series, 2)``."""
        output, state = self.lstm(past)
        mean, forecasts = self.head(output[-1:])[..., :1], []
        for hour in covariates.split(1):
            output, state = self.lstm(torch.cat((mean, hour), -1), state)
            parameters = self.head(output)
            mean = parameters[..., :1]
            forecasts.append(parameters)
        return torch.cat(forecasts)


class VoiceActivity(nn.Module):
    """Detects speech in a stream, frame by frame: a convolution, two GRU layers, a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(40, 64, 3)
        self.gru = nn.GRU(64, 64, 2)
        self.head = nn.Linear(64, 1)
        self.inputs = (torch.randn(102, 1, 40),)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the probability of speech of each frame, ``(frames, 1, 1)``."""
        state, results = None, []
        for t in range(len(frames) - 2):
            features = self.conv(frames[t : t + 3].permute(1, 2, 0)).permute(2, 0, 1).relu()
            output, state = self.gru(features, state)
            results.append(self.head(output).sigmoid())
        return torch.cat(results)


class Policy(nn.Module):
    """A policy that acts in 8 environments; an episode that ends sets its state to zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 64), nn.Tanh())
        self.gru = nn.GRU(64, 64)
        self.head = nn.Linear(64, 5)
        self.inputs = (torch.randn(64, 8, 12), (torch.rand(64, 8, 1) > 0.03).float())

    def forward(self, observations: Tensor, alive: Tensor) -> Tensor:
        """Return a score for each action, ``(steps, environments, actions)``."""
        state, logits = torch.zeros(1, 8, 64), []
        for observation, mask in zip(observations.split(1), alive, strict=True):
            output, state = self.gru(self.encoder(observation), state * mask)
            logits.append(self.head(output))
        return torch.cat(logits)


class Decoder(nn.Module):
    """A decoder of speech frames with attention over a text: Tacotron 2, with half of its units."""

    def __init__(self) -> None:
        super().__init__()
        self.prenet = nn.Sequential(nn.Linear(80, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.attention_rnn = nn.LSTMCell(128 + 256, 512)
        self.decoder_rnn = nn.LSTMCell(512 + 256, 512)
        self.query, self.memory, self.score = nn.Linear(512, 64), nn.Linear(256, 64), nn.Linear(64, 1)
        self.frame = nn.Linear(512 + 256, 80)
        self.inputs = (torch.randn(4, 40, 256),)

    def forward(self, text: Tensor) -> Tensor:
        """Return the frames, ``(frames, texts, bands)``."""
        keys, frame, context = self.memory(text), text.new_zeros(4, 80), text.new_zeros(4, 256)
        attention, decoder, frames = None, None, []
        for _ in range(50):
            attention = self.attention_rnn(torch.cat((self.prenet(frame), context), -1), attention)
            weights = self.score(torch.tanh(keys + self.query(attention[0]).unsqueeze(1))).softmax(1)
            context = (weights * text).sum(1)
            decoder = self.decoder_rnn(torch.cat((attention[0], context), -1), decoder)
            frame = self.frame(torch.cat((decoder[0], context), -1))
            frames.append(frame)
        return torch.stack(frames)


class CharacterModel(nn.Module):
    """Predicts the next character of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(65, 64)
        self.lstm = nn.LSTM(64, 256, 2)
        self.head = nn.Linear(256, 65)
        self.inputs = (torch.randint(0, 65, (100, 32)),)

    def forward(self, characters: Tensor) -> Tensor:
        """Return a score for each next character, ``(time, texts, characters)``."""
        return self.head(self.lstm(self.embed(characters))[0])


class SampleModel(nn.Module):
    """Computes audio sample by sample, feeding back what it computed: the loop of WaveRNN."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(1 + 32, 128)
        self.first, self.second = nn.GRUCell(128, 128), nn.GRUCell(128, 128)
        self.head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
        self.inputs = (torch.randn(200, 1, 32),)

    def forward(self, conditions: Tensor) -> Tensor:
        """Return the samples, ``(samples, 1, 1)``."""
        first = second = torch.zeros(1, 128)
        sample, samples = torch.zeros(1, 1), []
        for condition in conditions:
            features = self.input(torch.cat((sample, condition), -1))
            first = self.first(features, first)
            second = self.second(features + first, second)
            sample = self.head(features + second).tanh()
            samples.append(sample)
        return torch.stack(samples)


class MissingValues(nn.Module):
    """Classifies records with missing values, whose state decays over time, as in GRU-D."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Linear(33, 64)
        self.cell = nn.GRUCell(2 * 33, 64)
        self.head = nn.Linear(64, 1)
        self.inputs = (
            torch.randn(48, 32, 33),
            (torch.rand(48, 32, 33) < 0.3).float(),
            torch.rand(48, 32, 33),
        )

    def forward(self, values: Tensor, observed: Tensor, elapsed: Tensor) -> Tensor:
        """Return a score for each record, ``(records, 1)``."""
        state = values.new_zeros(32, 64)
        for value, mask, time in zip(values, observed, elapsed, strict=True):
            state = state * torch.exp(-self.decay(time).relu())
            state = self.cell(torch.cat((value * mask, mask), -1), state)
        return self.head(state)


MODELS: dict[type[nn.Module], str] = {
    Tagger: "packed BiLSTM tagger, 2 layers of 128 units, 32 sentences",
    Forecaster: "DeepAR-like forecaster, 3 layers of 40 units, 64 series",
    VoiceActivity: "voice activity, 2 GRU layers of 64 units, 100 frames in a stream",
    Policy: "policy, GRU of 64 units, 64 steps in 8 environments with resets",
    Decoder: "Tacotron-like decoder, 2 LSTM cells of 512 units, 50 frames",
    CharacterModel: "character model, 2 LSTM layers of 256 units, 100 × 32",
    SampleModel: "WaveRNN-like loop, 2 GRU cells of 128 units, 200 samples",
    MissingValues: "GRU-D-like loop, GRU cell of 64 units, 48 × 32",
}
