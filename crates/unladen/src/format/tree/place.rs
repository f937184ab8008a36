//! Where a value stands, as Python writes it.

use super::{Walk, children::Segment};
use std::fmt::Write as _;

impl Walk<'_> {
    /// The path as Python writes it: `['a'][0]`, where a key's type can be seen.
    pub(super) fn place(&self) -> String {
        let mut place = String::new();
        for frame in &self.frames {
            let segment = frame.children.get(self.arena, frame.next - 1).map(|(segment, ..)| segment);
            match segment {
                Some(Segment::Key(key)) if self.arena.is_text_key(key) => {
                    place.push_str("['");
                    self.arena.push_key(key, &mut place);
                    place.push_str("']");
                }
                Some(Segment::Key(key)) => {
                    place.push('[');
                    self.arena.push_key(key, &mut place);
                    place.push(']');
                }
                // Writing to a string cannot fail.
                Some(Segment::Index(index)) => drop(write!(place, "[{index}]")),
                Some(Segment::Name(name)) => drop(write!(place, ".{name}")),
                Some(Segment::Nothing) | None => {}
            }
        }
        place
    }
}
