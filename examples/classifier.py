"""Cross-GPU BN in a plain Horovod image classifier: ``horovodrun -np 2 python examples/classifier.py [FOLDER]``."""

import sys

import horovod.torch as hvd
import torch
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import datasets, models, transforms

from horovod_megdet import comm, convert_batch_norm

comm.init()  # hvd.init() with launch settings tuned for many small messages
torch.manual_seed(0)
crop = transforms.Compose([transforms.RandomResizedCrop(64), transforms.ToTensor()])
fake = datasets.FakeData(size=64, image_size=(3, 80, 80), num_classes=10, transform=crop)
dataset = datasets.ImageFolder(sys.argv[1], crop) if len(sys.argv) > 1 else fake
sampler = DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank())
loader = DataLoader(dataset, batch_size=4, sampler=sampler, drop_last=True)

model = convert_batch_norm(models.resnet18(num_classes=1000))  # the one line: statistics over the images of all ranks
optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * hvd.size(), momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)

for epoch in range(2):
    sampler.set_epoch(epoch)
    for images, labels in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    if hvd.rank() == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)
