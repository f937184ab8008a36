//! What the driver of a GPU takes of its free memory for what a plan reserves there: more than the bytes.
//!
//! No manual gives the rule. That single allocations are rounded up to 2 MiB is known from other loaders; from which size on they
//! are, and in which steps smaller ones share a granule, is assumed here, on the safe side of what is free, and was not
//! measured on a GPU yet. The stand-in for a driver that the tests run over, `tests/fake_cuda`, follows the same rule.

use super::steps::Step;
use crate::{
    device::{Device, PerDevice},
    memory::Space,
};
use std::collections::BTreeMap;

/// What the driver of a GPU takes of its memory at a time.
pub const GRANULE_BYTES: u64 = 2 << 20;

/// What is at least this long has granules to itself, rounded up to whole ones; what is shorter shares them with others.
const OWN_GRANULES_BYTES: u64 = 1 << 20;

/// What shares a granule is rounded up to this.
pub(super) const STEP_BYTES: u64 = 512;

/// The most that is taken of each GPU while the steps run, in whole granules; nothing for the host.
pub(super) fn taken_bytes(steps: &[Step], n_slots: usize) -> PerDevice {
    let mut slots = vec![None; n_slots];
    let mut gpus: BTreeMap<Device, Gpu> = BTreeMap::new();
    for step in steps {
        match step {
            Step::Reserve { slot, space: Space::Device(device @ Device::Cuda(_)), len_bytes, .. } => {
                let granule = gpus.entry(*device).or_default().take(*len_bytes);
                slots[slot.0 as usize] = Some((*device, *len_bytes, granule));
            }
            Step::Release(slot) => {
                if let Some((device, len_bytes, granule)) = slots[slot.0 as usize].take()
                    && let Some(gpu) = gpus.get_mut(&device)
                {
                    gpu.give_back(len_bytes, granule);
                }
            }
            _ => {}
        }
    }
    let mut taken = PerDevice::default();
    for (device, gpu) in gpus {
        if let Some(bytes) = taken.get_mut(device) {
            *bytes = gpu.peak_bytes;
        }
    }
    taken
}

/// The memory of one.
#[derive(Default)]
struct Gpu {
    taken_bytes: u64,
    peak_bytes: u64,
    /// What is in use of each granule that is shared; 0: it was given back, and is not taken again.
    shared: Vec<u64>,
    /// For each length in steps: the granules before this one have no room for it. Without it, what a hundred thousand
    /// tensors take would be minutes of looking for room.
    first_with_room: Vec<usize>,
}

impl Gpu {
    /// Takes memory; the granule, if it is shared.
    fn take(&mut self, len_bytes: u64) -> Option<usize> {
        if len_bytes >= OWN_GRANULES_BYTES {
            self.grow(len_bytes.next_multiple_of(GRANULE_BYTES));
            return None;
        }
        let len_bytes = len_bytes.next_multiple_of(STEP_BYTES);
        if len_bytes == 0 {
            return None;
        }
        self.first_with_room.resize((OWN_GRANULES_BYTES / STEP_BYTES + 1) as usize, 0);
        let first = &mut self.first_with_room[(len_bytes / STEP_BYTES) as usize];
        let has_room = |used_bytes: &u64| *used_bytes > 0 && used_bytes + len_bytes <= GRANULE_BYTES;
        let found = self.shared[*first..].iter().position(has_room).map(|it| *first + it);
        let granule = found.unwrap_or(self.shared.len());
        *first = granule;
        match found {
            Some(granule) => self.shared[granule] += len_bytes,
            None => {
                self.shared.push(len_bytes);
                self.grow(GRANULE_BYTES);
            }
        }
        Some(granule)
    }

    fn give_back(&mut self, len_bytes: u64, granule: Option<usize>) {
        let Some(granule) = granule else {
            let is_own = len_bytes >= OWN_GRANULES_BYTES;
            self.taken_bytes -= if is_own { len_bytes.next_multiple_of(GRANULE_BYTES) } else { 0 };
            return;
        };
        self.shared[granule] -= len_bytes.next_multiple_of(STEP_BYTES);
        if self.shared[granule] == 0 {
            self.taken_bytes -= GRANULE_BYTES;
        }
        while self.shared.last() == Some(&0) {
            self.shared.pop();
        }
        let first = granule.min(self.shared.len());
        self.first_with_room.iter_mut().for_each(|it| *it = first.min(*it));
    }

    fn grow(&mut self, bytes: u64) {
        self.taken_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.taken_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::SlotId;
    use proptest::prelude::*;

    const GPU: Device = Device::Cuda(3);

    fn reserve(slot: u32, device: Device, len_bytes: u64) -> Step {
        let (slot, space) = (SlotId(slot), Space::Device(device));
        Step::Reserve { slot, space, len_bytes, owner: "test", tensor: None }
    }

    /// Granules for so many bytes, each in memory of its own.
    fn granules(lens_bytes: &[u64]) -> u64 {
        let steps: Vec<_> = lens_bytes.iter().zip(0..).map(|(len, slot)| reserve(slot, GPU, *len)).collect();
        let taken = taken_bytes(&steps, steps.len());
        assert_eq!(taken.total_bytes(), taken.get(GPU));
        assert_eq!(taken.get(GPU) % GRANULE_BYTES, 0);
        taken.get(GPU) / GRANULE_BYTES
    }

    #[test]
    fn large_memory_takes_whole_granules_and_small_memory_shares_them() {
        const MIB: u64 = 1 << 20;
        for (lens_bytes, expected) in [
            (&[][..], 0),
            (&[0, 0], 0),
            (&[1], 1),
            (&[MIB], 1),
            (&[MIB, MIB], 2),
            (&[2 * MIB], 1),
            (&[2 * MIB + 1], 2),
            (&[MIB - 512, MIB - 512, 1024], 1),
            (&[MIB - 511, MIB - 512, 513], 2),
            (&[MIB - 1, MIB - 1], 1),
            // What comes later fills what is left of the first.
            (&[1_000_000, 1_000_000, 1_000_000, 50_000, 40_000], 2),
        ] {
            assert_eq!(granules(lens_bytes), expected, "{lens_bytes:?}");
        }
        // A tensor of 512 bytes is rounded up to no more than that.
        assert_eq!(granules(&[512; 4096]), 1);
        assert_eq!(granules(&[513; 4096]), 2);
    }

    #[test]
    fn each_gpu_has_granules_of_its_own_and_the_host_has_none() {
        let steps = [
            reserve(0, Device::Cuda(0), 3 << 20),
            reserve(1, Device::Cuda(1), 5),
            reserve(2, Device::Host, 7 << 20),
            Step::Release(SlotId(0)),
            reserve(0, Device::Cuda(1), 5),
        ];
        let taken = taken_bytes(&steps, 3);
        assert_eq!([Device::Cuda(0), Device::Cuda(1)].map(|it| taken.get(it)), [4 << 20, 2 << 20]);
        assert_eq!(taken.total_bytes(), 6 << 20);
    }

    #[test]
    fn a_granule_is_given_back_with_the_last_that_lies_in_it() {
        let small = |slot| reserve(slot, GPU, 600_000);
        // Six in two granules; two leave one of them, the third takes it along.
        let mut steps: Vec<_> = (0..6).map(small).collect();
        steps.extend([1, 2].map(|it| Step::Release(SlotId(it))));
        steps.push(reserve(6, GPU, 2 << 20));
        assert_eq!(taken_bytes(&steps, 7).get(GPU), 3 * GRANULE_BYTES);
        steps.insert(8, Step::Release(SlotId(0)));
        assert_eq!(taken_bytes(&steps, 7).get(GPU), 2 * GRANULE_BYTES);
        // What was left free is used again, and what was given back is not.
        steps.extend([small(0), small(1)]);
        assert_eq!(taken_bytes(&steps, 7).get(GPU), 3 * GRANULE_BYTES);
    }

    #[test]
    fn a_hundred_thousand_tensors_that_come_and_go_take_what_is_there_at_once() {
        let lens = (0..100_000u32).map(|it| (it, u64::from(it) * 7919 % 1_000_000));
        let mut steps: Vec<_> = lens.clone().map(|(slot, len)| reserve(slot, GPU, len)).collect();
        let held = taken_bytes(&steps, 100_000).get(GPU);
        let needed: u64 = lens.map(|(_, len)| len.next_multiple_of(STEP_BYTES)).sum();
        assert!(held >= needed && held < needed + needed / 4, "{held} bytes for {needed}");
        steps = (0..100_000).flat_map(|_| [reserve(0, GPU, 5000), Step::Release(SlotId(0))]).collect();
        assert_eq!(taken_bytes(&steps, 1).get(GPU), GRANULE_BYTES);
    }

    /// The same by a search from the beginning, granules by number.
    fn slow(work: &[(u8, u64)]) -> u64 {
        let (mut held, mut granules): (BTreeMap<u8, (u64, u64)>, BTreeMap<u64, u64>) = Default::default();
        let mut peak = 0;
        for &(slot, len) in work {
            let len = len.next_multiple_of(512);
            match held.remove(&slot) {
                Some((granule, len)) if granule > 0 => {
                    *granules.get_mut(&granule).unwrap() -= len;
                    granules.retain(|_, used| *used > 0);
                }
                Some(_) => {}
                None if len >= 1 << 20 => drop(held.insert(slot, (0, len))),
                None if len == 0 => {}
                None => {
                    let found = granules.iter().find(|(_, used)| **used + len <= 2 << 20).map(|it| *it.0);
                    let granule =
                        found.unwrap_or_else(|| granules.last_key_value().map_or(0, |it| *it.0) + 1);
                    *granules.entry(granule).or_default() += len;
                    held.insert(slot, (granule, len));
                }
            }
            let own = held.values().filter(|(granule, _)| *granule == 0);
            peak = peak.max(own.map(|(_, len)| len.div_ceil(2 << 20)).sum::<u64>() + granules.len() as u64);
        }
        peak * (2 << 20)
    }

    proptest! {
        #[test]
        fn what_is_taken_is_what_a_plain_search_takes(
            work in prop::collection::vec((0u8..40, prop_oneof![1u64..1_048_000, 1_048_577u64..9_000_000]), 0..300),
        ) {
            let mut is_held = [false; 40];
            let steps: Vec<_> = work.iter().map(|&(slot, len)| {
                let held = &mut is_held[slot as usize];
                *held = !*held;
                if *held { reserve(u32::from(slot), GPU, len) } else { Step::Release(SlotId(u32::from(slot))) }
            }).collect();
            prop_assert_eq!(taken_bytes(&steps, 40).get(GPU), slow(&work));
        }
    }
}
