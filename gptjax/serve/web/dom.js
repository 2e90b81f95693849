// The two words that the chat's files make their elements with.
export const $ = (id) => document.getElementById(id);
export const make = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; if (text !== undefined) e.textContent = text; return e; };
