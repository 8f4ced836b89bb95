//! Lists of handles, newest first, looked at from the oldest: what every queue of a policy is made of.
//!
//! Owns the links. Invariants: a handle is in one list at most; a list's length is the number of handles in it. Memory: 10 B
//! a handle, by the largest. Leaves to others: what a list means.

use super::Handle;

const NONE: Handle = u32::MAX;
const NOWHERE: u16 = u16::MAX;

#[derive(Debug)]
pub(super) struct Lists {
    links: Vec<Link>,
    /// Apart from the links: to know where a handle is reads two bytes.
    places: Vec<u16>,
    lists: Vec<List>,
    len: usize,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    newer: Handle,
    older: Handle,
}

#[derive(Debug, Clone, Copy)]
struct List {
    newest: Handle,
    oldest: Handle,
    len: u32,
}

impl Lists {
    pub(super) fn new(lists: usize) -> Self {
        assert!(lists < usize::from(NOWHERE), "{lists} lists");
        let empty = List { newest: NONE, oldest: NONE, len: 0 };
        Self { links: Vec::new(), places: Vec::new(), lists: vec![empty; lists], len: 0 }
    }

    /// Handles in all lists.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn len_of(&self, list: usize) -> usize {
        self.lists[list].len as usize
    }

    /// The list that it is in. Panics if it is in none: the caller's promise.
    pub(super) fn list_of(&self, handle: Handle) -> usize {
        match self.places.get(handle as usize) {
            Some(&place) if place != NOWHERE => place.into(),
            _ => panic!("handle {handle} is not here"),
        }
    }

    pub(super) fn oldest(&self, list: usize) -> Option<Handle> {
        let oldest = self.lists[list].oldest;
        (oldest != NONE).then_some(oldest)
    }

    /// The next newer one of its list.
    #[cfg(test)]
    pub(super) fn newer(&self, handle: Handle) -> Option<Handle> {
        let newer = self.links[handle as usize].newer;
        (newer != NONE).then_some(newer)
    }

    /// As the oldest of the list.
    pub(super) fn push_oldest(&mut self, list: usize, handle: Handle) {
        let Some(oldest) = self.oldest(list) else { return self.push(list, handle) };
        let at = handle as usize;
        assert_eq!(self.places[at], NOWHERE, "handle {handle} inserted twice");
        self.links[at] = Link { newer: oldest, older: NONE };
        self.links[oldest as usize].older = handle;
        self.lists[list].oldest = handle;
        self.lists[list].len += 1;
        self.len += 1;
        self.places[at] = list as u16;
    }

    /// As the newest of the list.
    pub(super) fn push(&mut self, list: usize, handle: Handle) {
        let at = handle as usize;
        if at >= self.places.len() {
            self.places.resize(at + 1, NOWHERE);
            self.links.resize(at + 1, Link { newer: NONE, older: NONE });
        }
        assert_eq!(self.places[at], NOWHERE, "handle {handle} inserted twice");
        let into = &mut self.lists[list];
        let second = std::mem::replace(&mut into.newest, handle);
        into.len += 1;
        self.len += 1;
        self.links[at] = Link { newer: NONE, older: second };
        match second {
            NONE => into.oldest = handle,
            second => self.links[second as usize].newer = handle,
        }
        self.places[at] = list as u16;
    }

    /// Out of its list, which is returned.
    pub(super) fn unlink(&mut self, handle: Handle) -> usize {
        let list = self.list_of(handle);
        let Link { newer, older } = self.links[handle as usize];
        let from = &mut self.lists[list];
        from.len -= 1;
        self.len -= 1;
        match newer {
            NONE => from.newest = older,
            newer => self.links[newer as usize].older = older,
        }
        match older {
            NONE => from.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        self.places[handle as usize] = NOWHERE;
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agree_with_deques(steps in proptest::collection::vec((0..3usize, 0..16u32, any::<bool>()), 1..300)) {
            let mut lists = Lists::new(3);
            let mut model = vec![Vec::<Handle>::new(); 3];
            for (list, handle, oldest) in steps {
                if let Some(was) = model.iter().position(|list| list.contains(&handle)) {
                    prop_assert_eq!(lists.unlink(handle), was);
                    model[was].retain(|known| *known != handle);
                } else if oldest && model.iter().flatten().any(|known| *known > handle) {
                    lists.push_oldest(list, handle);
                    model[list].insert(0, handle);
                } else {
                    lists.push(list, handle);
                    model[list].push(handle);
                    prop_assert_eq!(lists.list_of(handle), list);
                }
                for (list, model) in model.iter().enumerate() {
                    let found: Vec<_> = std::iter::successors(lists.oldest(list), |at| lists.newer(*at)).collect();
                    prop_assert_eq!(&found, model);
                    prop_assert_eq!(lists.len_of(list), model.len());
                }
                prop_assert_eq!(lists.len(), model.iter().map(Vec::len).sum::<usize>());
            }
        }
    }
}
