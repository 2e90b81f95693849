// What a screen reader is told: whole sentences, not every token.
import {$, make} from "/web/dom.js";

export function tell(text) {
  const plain = text.replace(/[*_`#|>~]+/g, " ").replace(/\s+/g, " ").trim();
  if (!plain) return;
  $("live").append(make("p", "", plain));
  while ($("live").children.length > 20) $("live").firstChild.remove();
}
export function speaker() {
  let rest = "";
  return {
    add(text) {
      rest += text;
      const match = /^[\s\S]*(?:[.!?…](?=\s)|[。！？]|\n)/.exec(rest);
      if (match) { tell(match[0]); rest = rest.slice(match[0].length); }
    },
    end(why) { tell(rest); if (why) tell(why); },
  };
}
