//! The memory of a model that is there before its weights are: in one range, or on a GPU each tensor's by itself.

use super::{
    generate::{Generator, span},
    items::Item,
    on_gpu,
    place::{self, Place, packed},
    steps::{Fill, Span, Step, Steps},
};
use crate::{device::Device, memory::Space};

impl Generator<'_> {
    /// The model's own memory, with initial values or without.
    pub(super) fn model(
        &self,
        steps: &mut Steps,
        device: Device,
        items: &[Item],
        is_random: bool,
    ) -> Vec<Place> {
        let is_gpu = device != Device::Host;
        let align_bytes = if is_gpu { on_gpu::ALIGN_BYTES } else { place::ALIGN_BYTES };
        let in_one_range = |steps: &mut Steps, space: Space| {
            let slot = steps.slot();
            let (places, len_bytes) = packed(items, slot, align_bytes);
            steps.reserve_slot(slot, space, len_bytes, "model", None);
            (places, Span { slot, start_byte: 0, len_bytes })
        };
        let fill = |places: &[Place]| {
            let fills = items.iter().zip(places);
            Step::Fill(
                fills.map(|(item, place)| Fill { tensor: item.tensor, target: span(item, *place) }).collect(),
            )
        };
        // A model is made on the host, and moved.
        let made = (is_random && is_gpu).then(|| {
            let (made, whole) = in_one_range(steps, Space::Host);
            steps.push(fill(&made));
            (made, whole)
        });
        let space = Space::Device(device);
        if is_gpu && self.frees_singly {
            let place = |item: &Item| {
                let slot = steps.reserve(space, item.len_bytes(), "model", Some(item.tensor));
                Place { slot, start_byte: 0 }
            };
            let places: Vec<Place> = items.iter().map(place).collect();
            if let Some((made, whole)) = made {
                for ((item, made), place) in items.iter().zip(made).zip(&places) {
                    self.copy(steps, span(item, made), span(item, *place));
                }
                steps.release(whole.slot);
            }
            return places;
        }
        let (places, whole) = in_one_range(steps, space);
        match made {
            Some((_, made)) => {
                self.copy(steps, made, whole);
                steps.release(made.slot);
            }
            None if is_random => steps.push(fill(&places)),
            None => {}
        }
        places
    }
}
